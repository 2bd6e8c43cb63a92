"""`kvgauge.generate` answers as the stage does, and refuses a moment of compression that it does not know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvgauge
from kvgauge.errors import UserError
from kvgauge.evaluation.answering import Answerer
from kvgauge.evaluation.cell import Cell
from kvgauge.evaluation.engine import Engine
from kvgauge.evaluation.store import AnswerStore
from kvgauge.evaluation.units import Encoder, make_units
from kvgauge.prompts.samples import Sample

Tiny = tuple[PreTrainedModel, PreTrainedTokenizerBase]


class Nobody:
    """Watches nothing."""

    def answered(self, cell: Cell, sample: Sample, text: str) -> None:
        """Nothing is done with an answer."""


def answer(tiny: Tiny, sample: Sample, cell: Cell, **changed: Any) -> str:
    given = {
        "fitted": cell.fitted,
        "max_new_tokens": sample.max_new_tokens,
        "compress_at": cell.compress_at,
        "answer_prefix": sample.answer_prefix,
    }
    return kvgauge.generate(*tiny, sample.context, sample.question, cell.method, **given | changed)


@pytest.mark.parametrize("compress_at", ["context", "prompt"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("streaming_llm", {"window": 32, "start": 4}),
        ("mean_merge", {"window": 32, "start": 4}),
        ("kvslimmer", {"window": 32, "start": 4}),
        ("asymkv", {"window": 32, "start": 4}),
        ("ksvd", {"compress_prefill": True}),
        ("xkv", {"group_size": 2}),
        ("minicache", {"budget": 0.9}),
        ("compose", {"compose": ["kvslimmer", "int8"], "budget": 0.25}),
        ("kvpress/snapkv", {"window_size": 8}),
    ],
)
def test_it_answers_as_the_stage(
    tiny: Tiny,
    make_cell: Callable[..., Cell],
    make_samples: Callable[..., list[Sample]],
    tmp_path: Path,
    name: str,
    settings: dict[str, Any],
    compress_at: str,
) -> None:
    cell = make_cell(name, compress_at, **{"budget": 0.5} | settings)
    samples, store = make_samples(2, words=40, max_new_tokens=12), AnswerStore(tmp_path)
    encoder = Encoder(*tiny, chat=None)
    units = make_units(samples, encoder)
    Engine(Answerer(*tiny), encoder, [cell], store, Nobody()).run(units)
    for sample, unit in zip(samples, units, strict=True):
        record = store.get(cell.fingerprint, unit.keys[0])
        assert record is not None
        assert answer(tiny, sample, cell) == record["text"].strip()


@pytest.mark.parametrize("compress_at", ["Context", "question", "", None])
def test_another_moment_is_refused(
    tiny: Tiny, make_cell: Callable[..., Cell], make_samples: Callable[..., list[Sample]], compress_at: Any
) -> None:
    [sample], cell = make_samples(1), make_cell("streaming_llm", budget=0.5)
    with pytest.raises(UserError, match=r"^unknown compress_at .*choose one of context, prompt$"):
        answer(tiny, sample, cell, compress_at=compress_at)


def test_both_moments_are_not_the_same(
    tiny: Tiny, make_cell: Callable[..., Cell], make_samples: Callable[..., list[Sample]]
) -> None:
    [sample], cell = make_samples(1, max_new_tokens=24), make_cell("streaming_llm", budget=0.25, window=16, start=2)
    assert answer(tiny, sample, cell, compress_at="context") != answer(tiny, sample, cell, compress_at="prompt")
