"""A tiny random model, methods fitted to it, and samples of RULER's form, small enough to answer in milliseconds."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvgauge
from kvgauge.contract.fitting import learns
from kvgauge.evaluation.cell import Cell
from kvgauge.prompts.samples import Sample

CellMaker = Callable[..., Cell]
SampleMaker = Callable[..., list[Sample]]


@pytest.fixture(scope="session")
def tiny() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return kvgauge.load_model("tiny/llama")


@pytest.fixture(scope="session")
def moments(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> kvgauge.Moments:
    generator = torch.Generator().manual_seed(0)
    return kvgauge.collect(tiny[0], [torch.randint(3, 259, (2, 128), generator=generator)])


@pytest.fixture(scope="session")
def make_cell(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase], moments: kvgauge.Moments) -> CellMaker:
    def make(name: str, compress_at: str = "context", **overrides: Any) -> Cell:
        method = kvgauge.build_method(name, **overrides)
        fitted = method.fit(moments, tiny[0]) if learns(method) else None
        return Cell(method, compress_at, fitted, {"label": method.label, "compress_at": compress_at, **overrides})

    return make


@pytest.fixture(scope="session")
def make_samples() -> SampleMaker:
    def make(count: int, words: int = 30, max_new_tokens: int = 6, keys: int = 3) -> list[Sample]:
        samples = []
        for index in range(count):
            rng = random.Random(index)
            hidden = {f"key-{rng.randrange(10**6)}": str(rng.randrange(10**6)) for _ in range(keys)}
            needles = [f"One of the special magic numbers for {key} is: {value}." for key, value in hidden.items()]
            noise = [rng.choice(["grass", "sky", "sun", "green", "blue"]) for _ in range(words + 7 * index)]
            asked, wanted = next(iter(hidden.items()))
            samples.append(
                Sample(
                    id=f"niah_multikey_1-256-{index:04d}",
                    task="niah_multikey_1",
                    context=" ".join([*needles, *noise]) + "\n",
                    question=f"What is the special magic number for {asked} mentioned in the provided text?",
                    answer_prefix=f"The special magic number for {asked} mentioned in the provided text is",
                    answers=(wanted,),
                    max_new_tokens=max_new_tokens,
                    length=256,
                )
            )
        return samples

    return make
