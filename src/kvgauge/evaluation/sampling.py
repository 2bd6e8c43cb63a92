"""Sampled answers: tokens drawn from the model's distribution at a temperature, every answer from its own seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvgauge.errors import UserError
from kvgauge.prompts.samples import Sample

PROMPT, REPEAT = "prompt", "repeat"  # facts of a repeated sample: the id of the one that it repeats, and its number


class Sampler:
    """Draws the next token of every sequence of a batch.

    Each sequence draws from a generator of its own, seeded with the run's seed and the sample's id: an answer depends
    neither on the others of its batch nor on the order of the cells, and all cells draw the same numbers, which makes
    their paired differences smaller.

    Args:
        temperature: above 0; the distribution is that of softmax(logits / temperature).
        seed: of the run.
        names: for each sequence the id of its sample.
    """

    def __init__(self, temperature: float, seed: int, names: Sequence[str]) -> None:
        self.temperature = temperature
        self.generators = [_generator(f"{seed}/{name}") for name in names]

    def __call__(self, logits: Tensor) -> Tensor:
        """Tokens (batch,) from logits (batch, vocabulary)."""
        scaled = (logits.double() / self.temperature).softmax(dim=-1).cpu()
        drawn = [
            torch.multinomial(row, 1, generator=generator)
            for row, generator in zip(scaled, self.generators, strict=True)
        ]
        return torch.cat(drawn).to(logits.device)


def _generator(seed: str) -> torch.Generator:
    value = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(value)


def repeated(samples: Sequence[Sample], repeats: int) -> list[Sample]:
    """Every sample so many times, one behind the other; as they are for one time.

    More repeats add to those there are.
    """
    if repeats == 1:
        return list(samples)
    return [
        replace(sample, id=f"{sample.id}~{number}", facts={**sample.facts, PROMPT: sample.id, REPEAT: number})
        for sample in samples
        for number in range(1, repeats + 1)
    ]


def check(temperature: float, repeats: int, *, turns: int, draft_tokens: int, samples: Sequence[Sample]) -> None:
    """Refuse what cannot be sampled, or would be the same every time.

    Raises:
        UserError: the line says which, and what to set.
    """
    if temperature < 0:
        raise UserError(f"temperature is {temperature:g}: set it to 0 (greedy) or more")
    if repeats < 1:
        raise UserError(f"repeats is {repeats}: set it to 1 or more")
    if repeats > 1 and temperature == 0:
        raise UserError(
            f"repeats={repeats} without a temperature gives the same answer {repeats} times: set temperature, "
            f"e.g. temperature=0.7, or repeats=1"
        )
    if temperature > 0 and draft_tokens:
        raise UserError("drafts are of greedy answers: set draft_tokens=0, or temperature=0")
    if repeats > 1 and turns > 1:
        raise UserError("repeats are of single questions: set repeats=1, or turns=1")
    if repeats > 1 and any(sample.choices for sample in samples):
        raise UserError("likelihoods are the same every time: set repeats=1, or take tasks whose answers are generated")
