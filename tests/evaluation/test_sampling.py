"""Sampled answers: the right distribution, seeds of their own, statistics over prompts, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvgauge
from kvgauge.errors import UserError
from kvgauge.evaluation.decoding import greedy_batch, prefill
from kvgauge.evaluation.sampling import Sampler, check, repeated
from kvgauge.evaluation.statistics import summarise
from kvgauge.evaluation.units import Encoder, make_units
from kvgauge.methods.exact.full import Full
from kvgauge.prompts.samples import Choice, Sample

Tiny = tuple[PreTrainedModel, PreTrainedTokenizerBase]
SampleMaker = Callable[..., list[Sample]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_with_the_chance_of_their_softmax(temperature: float) -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, 0.5]])
    draw = Sampler(temperature, 3, ["a"])
    count = 4000
    drawn = np.bincount([int(draw(logits)) for _ in range(count)], minlength=5)
    wanted = (logits[0].double() / temperature).softmax(0).numpy() * count
    assert stats.chisquare(drawn, wanted).pvalue > 1e-4


def test_a_sequence_draws_by_its_name_and_seed_alone() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))

    def draws(seed: int, names: list[str], rows: list[int]) -> list[list[int]]:
        draw = Sampler(1.0, seed, names)
        return torch.stack([draw(logits[rows]) for _ in range(20)]).T.tolist()

    together = draws(1, ["a", "b", "c"], [0, 1, 2])
    assert draws(1, ["c", "a"], [2, 0]) == [together[2], together[0]]
    assert draws(2, ["a"], [0])[0] != together[0]
    assert draws(1, ["b"], [0])[0] != together[0]


def test_a_batch_samples_as_one_by_one() -> None:
    model = kvgauge.load_model("tiny/llama", dtype="float64")[0]
    ids = torch.randint(3, 259, (2, 30), generator=torch.Generator().manual_seed(2))

    def answers(rows: list[int]) -> list[list[int]]:
        cache = Full().new_cache(model)
        logits = prefill(model, ids[rows], cache)
        cache.compress()
        draw = Sampler(1.5, 0, [f"s{row}" for row in rows])
        return greedy_batch(model, logits, cache, [12] * len(rows), (), choose=draw)

    assert answers([0, 1]) == [answers([0])[0], answers([1])[0]]
    assert answers([0])[0] != answers([1])[0]


def test_repeats_are_samples_of_their_own(tiny: Tiny, make_samples: SampleMaker) -> None:
    samples = make_samples(2)
    assert repeated(samples, 1) == samples
    three = repeated(samples, 3)
    assert [sample.id for sample in three[:3]] == [f"{samples[0].id}~{number}" for number in (1, 2, 3)]
    assert repeated(samples, 4)[:3] == three[:3]
    assert three[1].facts["prompt"] == samples[0].id and three[1].facts["repeat"] == 2
    assert Sample.of(three[1].to_dict()) == three[1]
    units = make_units([replace(sample, id="same") for sample in three[:3]], Encoder(*tiny, chat=None))
    assert len({unit.keys[0] for unit in units}) == 3


def row(prompt: str | None, number: int, score: float, cell: str = "full", **more: Any) -> dict[str, Any]:
    known = {"cell": cell, "method": cell, "budget": None if cell == "full" else 0.5, "compress_at": "context"}
    sizes = {"nbytes": 100 + number, "full_nbytes": 200, "fixed_nbytes": 7}
    name = prompt or more.pop("name", "x")
    own = {"prompt": prompt, "repeat": number} if prompt else {}
    sample = f"{name}~{number}" if prompt else name
    return known | sizes | own | {"model": "m", "sample_id": sample, "task": "t", "length": 1, "score": score} | more


def test_the_interval_is_over_prompts_whose_scores_are_means() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 2, size=(12, 8)).astype(float)
    rows = [row(f"p{p}", r, float(scores[p, r])) for p in range(12) for r in range(8)]
    means = [row(None, 0, float(scores[p].mean()), name=f"p{p}", nbytes=103.5) for p in range(12)]
    [found, wanted] = [
        next(entry for entry in summarise(entries, seed=5) if entry["task"] == "t") for entries in (rows, means)
    ]
    assert found == wanted and found["n"] == 12
    assert found["mean"] == pytest.approx(scores.mean())


def test_repeated_answers_are_paired_by_prompt() -> None:
    rows = [row(f"p{p}", r, float((p + r) % 2)) for p in range(6) for r in range(4)]
    rows += [row(f"p{p}", r, float(p % 2 and (p + r) % 2), cell="other") for p in range(6) for r in range(4)]
    other = next(entry for entry in summarise(rows) if entry["task"] == "t" and entry["cell"] == "other")
    assert other["n"] == 6 and other["diff"] == pytest.approx(-0.25)
    with pytest.raises(ValueError, match="occurs twice"):
        summarise([row("p", 1, 1.0), row("p", 1, 1.0)])


@pytest.mark.parametrize(
    ("temperature", "repeats", "more", "message"),
    [
        (0.0, 4, {}, "repeats=4 without a temperature gives the same answer 4 times: set temperature"),
        (-0.1, 1, {}, r"temperature is -0\.1"),
        (0.5, 0, {}, "repeats is 0"),
        (0.5, 1, {"draft_tokens": 4}, "drafts are of greedy answers"),
        (0.5, 2, {"turns": 2}, "repeats are of single questions"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(
    temperature: float, repeats: int, more: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check(temperature, repeats, **{"turns": 1, "draft_tokens": 0} | more, samples=[])


def test_likelihoods_are_not_repeated(make_samples: SampleMaker) -> None:
    [sample] = make_samples(1)
    with pytest.raises(UserError, match="likelihoods are the same every time"):
        check(0.5, 2, turns=1, draft_tokens=0, samples=[replace(sample, choices=(Choice("a"),))])
    check(0.5, 2, turns=1, draft_tokens=0, samples=[sample])
