"""Dominance against a bootstrap written out, and against scores whose answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvgauge.evaluation.dominance import Comparison, best_by_budget, settings

Row = dict[str, Any]


def rows(
    cell: str, scores: dict[str, list[float]], share: float, budget: float | None = None, **more: Any
) -> list[Row]:
    return [
        {
            "cell": cell,
            "budget": budget,
            "task": task,
            "length": 512,
            "sample_id": f"{task}-{index}",
            "score": score,
            "nbytes": int(1000 * share),
            "full_nbytes": 1000,
            "model": "m",
            "compress_at": "context",
            **more,
        }
        for task, values in scores.items()
        for index, score in enumerate(values)
    ]


GOOD = {"vt": [1.0] * 17 + [0.0] * 3, "cwe": [0.9, 0.7] * 10}
POOR = {"vt": [1.0] * 5 + [0.0] * 15, "cwe": [0.3, 0.4] * 10}


def test_differences_are_the_stratified_bootstrap_of_pairs() -> None:
    draw = np.random.default_rng(3)
    first, second = ({"vt": draw.random(12).tolist(), "cwe": draw.random(30).tolist()} for _ in range(2))
    comparison = Comparison([*rows("a", first, 0.5), *rows("b", second, 0.5)])
    [found] = comparison.differences([("a", "b")])
    gaps = {task: np.array(first[task]) - np.array(second[task]) for task in first}
    wanted = float(np.mean([gap.mean() for gap in gaps.values()]))
    resampled = np.mean(
        [gap[draw.integers(0, gap.size, (20_000, gap.size))].mean(axis=1) for gap in gaps.values()], axis=0
    )
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert found["diff"] == pytest.approx(wanted)
    assert (found["diff_low"], found["diff_high"]) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))
    assert comparison.means()["a"] == pytest.approx(np.mean([np.mean(first["vt"]), np.mean(first["cwe"])]))


def test_a_cell_dominates_with_at_most_the_bytes_and_a_surely_better_score() -> None:
    comparison = Comparison([*rows("small", GOOD, 0.25), *rows("large", POOR, 0.5), *rows("even", GOOD, 0.5)])
    found = {(row["cell"], row["other"]): row for row in comparison.dominance()}
    assert set(found) == {("small", "large"), ("even", "large")}
    assert all(row["diff_low"] > 0 for row in found.values())
    larger = Comparison([*rows("small", POOR, 0.25), *rows("large", GOOD, 0.5)])
    assert larger.dominance() == []  # better, and larger


def test_a_difference_that_may_be_chance_is_no_dominance() -> None:
    slightly = {"vt": [*GOOD["vt"][:16], 0.0, *GOOD["vt"][17:]], "cwe": GOOD["cwe"]}
    assert Comparison([*rows("a", GOOD, 0.25), *rows("b", slightly, 0.25)]).dominance() == []


def test_only_shared_samples_count() -> None:
    fewer = {task: values[:4] for task, values in POOR.items()}
    comparison = Comparison([*rows("a", GOOD, 0.25), *rows("b", fewer, 0.25)])
    assert comparison.samples == 8
    assert comparison.means()["a"] == pytest.approx(np.mean([1.0, 0.8]))
    with pytest.raises(ValueError, match="no samples"):
        Comparison([])


def test_the_best_of_each_budget() -> None:
    samples = [
        *rows("ksvd@0.5", POOR, 0.5, 0.5),
        *rows("xkv@0.5", GOOD, 0.5, 0.5),
        *rows("mix@0.5", POOR, 0.5, 0.5, combination=True),
        *rows("ksvd@0.25", POOR, 0.25, 0.25),
        *rows("codes@4bit", POOR, 0.2501),
        *rows("mix@0.25", POOR, 0.24, 0.25, combination=True),
        *rows("full", GOOD, 1.0),
    ]
    half, quarter = best_by_budget(samples, Comparison(samples))
    assert (half["budget"], half["published"], half["combination"]) == (0.5, "xkv@0.5", "mix@0.25")
    assert half["combination_bytes_ratio"] == 0.24  # a quarter's cell is an answer for a half
    assert half["diff"] < 0 and half["diff_high"] < 0
    assert (quarter["published"], quarter["combination"]) == ("codes@4bit", "mix@0.25")
    assert quarter["diff"] == 0


def test_the_uncompressed_cache_stands_in_every_comparison() -> None:
    samples = [*rows("full", GOOD, 1.0), *rows("ksvd@0.5", POOR, 0.5, compress_at="prompt")]
    [(model, moment, found)] = settings(samples)
    assert (model, moment) == ("m", "prompt")
    assert {row["cell"] for row in found} == {"full", "ksvd@0.5"}
    assert Comparison(found).samples == 40
