"""Intervals that cover what they say, tests that agree with hand-computed values, and rows that add up."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats

from kvgauge.evaluation.statistics import (
    bootstrap_mean,
    bootstrap_task_mean,
    format_interval,
    paired_difference,
    sign_test,
    significant_decimals,
    smallest_detectable_difference,
    summarise,
)


def sample(cell: str, sample_id: str, score: float, **changes: Any) -> dict[str, Any]:
    """A row of SAMPLES with what `summarise` reads."""
    method, _, budget = cell.partition("@")
    row = {
        "cell": cell,
        "method": method,
        "budget": float(budget) if budget else None,
        "compress_at": "context",
        "model": "m",
        "sample_id": sample_id,
        "task": "niah",
        "length": 1024,
        "score": score,
        "nbytes": 100 if not budget else int(100 * float(budget)),
        "full_nbytes": 100,
        "fixed_nbytes": 0 if not budget else 7,
    }
    return row | changes


def row_of(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    assert len(found) == 1, found
    return found[0]


def test_bootstrap_equals_every_resample_of_a_small_sample() -> None:
    scores = [0.0, 0.25, 0.5, 1.0]
    means = [sum(resample) / 4 for resample in itertools.product(scores, repeat=4)]
    interval = bootstrap_mean(scores, resamples=40_000)
    assert interval.mean == pytest.approx(0.4375)
    assert interval.low == pytest.approx(np.quantile(means, 0.025), abs=0.0626)  # one step of the discrete means
    assert interval.high == pytest.approx(np.quantile(means, 0.975), abs=0.0626)


def test_bootstrap_is_seeded() -> None:
    scores = np.random.default_rng(1).random(30)
    assert bootstrap_mean(scores, seed=3) == bootstrap_mean(scores, seed=3)
    assert bootstrap_mean(scores, seed=3) != bootstrap_mean(scores, seed=4)


@pytest.mark.parametrize(("chance", "n"), [(0.6, 50), (0.85, 50), (0.97, 20)])
def test_intervals_cover_the_truth(chance: float, n: int) -> None:
    """Seeded simulation; at 0.97 and n = 20 more than half of the samples are all ones."""
    generator = np.random.default_rng(7)
    intervals = [bootstrap_mean(generator.random(n) < chance, seed=trial, resamples=500) for trial in range(400)]
    covered = np.mean([interval.low <= chance <= interval.high for interval in intervals])
    assert 0.90 <= covered <= 1.0


def test_stratified_interval_covers_the_truth() -> None:
    chances = {"a": 0.3, "b": 0.7, "c": 1.0}
    generator = np.random.default_rng(5)
    covered = 0
    for trial in range(300):
        scores = {task: generator.random(20) < chance for task, chance in chances.items()}
        interval = bootstrap_task_mean(scores, seed=trial, resamples=500)
        covered += interval.low <= 2 / 3 <= interval.high
    assert 0.90 <= covered / 300 <= 1.0


@pytest.mark.parametrize("n", [1, 5, 20])
def test_all_right_is_the_clopper_pearson_interval(n: int) -> None:
    exact = scipy.stats.binomtest(n, n).proportion_ci(0.95, method="exact")
    interval = bootstrap_mean(np.ones(n))
    assert (interval.mean, interval.low, interval.high) == pytest.approx((1.0, exact.low, exact.high))
    mirrored = bootstrap_mean(np.zeros(n))
    assert (mirrored.mean, mirrored.low, mirrored.high) == pytest.approx((0.0, 1 - exact.high, 1 - exact.low))


def test_equal_scores_inside_the_scale_are_uncertain_on_both_sides() -> None:
    interval = bootstrap_mean([0.5] * 10)
    share = 1 - 0.025**0.1
    assert interval.low == pytest.approx(0.5 - 0.5 * share)
    assert interval.high == pytest.approx(0.5 + 0.5 * share)


def test_constant_tasks_are_pooled() -> None:
    exact = scipy.stats.binomtest(65, 65).proportion_ci(0.95, method="exact")
    interval = bootstrap_task_mean({str(task): np.ones(5) for task in range(13)})
    assert (interval.mean, interval.low, interval.high) == pytest.approx((1.0, exact.low, 1.0))


def test_task_means_weigh_the_same() -> None:
    interval = bootstrap_task_mean({"long": [0.0, 1.0] * 50, "short": [0.0, 1.0, 1.0, 1.0]})
    assert interval.mean == pytest.approx((0.5 + 0.75) / 2)
    assert interval.low < interval.mean < interval.high


def test_stratified_resampling_is_narrower_than_pooled_where_tasks_differ() -> None:
    easy, hard = [1.0] * 19 + [0.0], [0.0] * 19 + [1.0]
    stratified = bootstrap_task_mean({"easy": easy, "hard": hard})
    pooled = bootstrap_mean(easy + hard)
    assert stratified.mean == pooled.mean
    assert stratified.high - stratified.low < pooled.high - pooled.low


@pytest.mark.parametrize("scores", [[], [1.2], [-0.1], [math.nan], [[0.5]]])
def test_scores_that_are_none_are_refused(scores: list[Any]) -> None:
    with pytest.raises(ValueError, match="score"):
        bootstrap_mean(scores)


def test_no_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="no tasks"):
        bootstrap_task_mean({})


@pytest.mark.parametrize(
    ("gains", "losses", "ties", "p_value"),
    [
        (0, 0, 4, 1.0),
        (1, 0, 0, 1.0),
        (5, 0, 9, 2 / 32),
        (6, 0, 0, 2 / 64),
        (1, 7, 3, 2 * (1 + 8) / 256),
        (3, 3, 0, 1.0),
    ],
)
def test_sign_test_by_hand(gains: int, losses: int, ties: int, p_value: float) -> None:
    assert sign_test([0.5] * gains + [-1.0] * losses + [0.0] * ties) == pytest.approx(p_value)


def test_paired_difference() -> None:
    a, b = [1.0, 0.0, 0.0, 0.0, 0.5, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    difference = paired_difference(a, b)
    assert difference.mean == pytest.approx(-0.75)
    assert -1.0 <= difference.low < -0.75 < difference.high < 0.0
    assert difference.p_value == pytest.approx(2 / 32)


def test_paired_difference_of_equal_runs_is_not_certain() -> None:
    difference = paired_difference([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    share = 1 - 0.025 ** (1 / 3)
    assert (difference.mean, difference.p_value) == (0.0, 1.0)
    assert (difference.low, difference.high) == pytest.approx((-share, share))


def test_unpaired_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        paired_difference([1.0, 0.0], [1.0])


def test_detectable_difference_reaches_its_power() -> None:
    """With the spread known from the data, a t-test at the answer finds the difference 8 times of 10."""
    generator = np.random.default_rng(11)
    spread = generator.normal(0.0, 0.1, size=15).clip(-1, 1)
    detectable = smallest_detectable_difference(spread)
    trials = generator.normal(detectable, spread.std(ddof=1), size=(4000, 15))
    found = scipy.stats.ttest_1samp(trials, 0.0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.025)


def test_detectable_difference_shrinks_with_samples_and_grows_with_power() -> None:
    few, many = [0.0, 1.0, 0.0, -1.0], [0.0, 1.0, 0.0, -1.0] * 10
    assert smallest_detectable_difference(many) < smallest_detectable_difference(few)
    assert smallest_detectable_difference(many, power=0.8) < smallest_detectable_difference(many, power=0.95)


def test_detectable_difference_without_spread() -> None:
    assert smallest_detectable_difference([0.0]) == pytest.approx(0.8)
    assert smallest_detectable_difference([0.0] * 10) == pytest.approx(1 - 0.2**0.1)


@pytest.mark.parametrize(
    ("half_width", "decimals"), [(0.5, 1), (0.36, 1), (0.354, 2), (0.1, 2), (0.096, 2), (0.05, 2), (0.012, 3), (25, 0)]
)
def test_decimals_follow_the_half_width(half_width: float, decimals: int) -> None:
    assert significant_decimals(-half_width, half_width) == decimals


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        ((5 / 6, 0.65, 0.96), "0.83 [0.65, 0.96]"),
        ((0.95, 0.9, 1.0), "0.95 [0.90, 1.00]"),
        ((0.5, 0.1, 0.9), "0.5 [0.1, 0.9]"),
        ((-0.001, -0.2, 0.2), "0.00 [-0.20, 0.20]"),
        ((4210.4, 3100.0, 5300.0), "4210 [3100, 5300]"),
    ],
)
def test_format_interval(interval: tuple[float, float, float], text: str) -> None:
    assert format_interval(*interval) == text


def test_summarise_by_hand() -> None:
    samples = [
        *(sample("full", f"niah-{i}", 1.0) for i in range(4)),
        *(sample("full", f"vt-{i}", score, task="vt") for i, score in enumerate([1.0, 0.5])),
        *(sample("kqsvd@0.5", f"niah-{i}", score) for i, score in enumerate([1.0, 0.0, 1.0, 0.0])),
        *(sample("kqsvd@0.5", f"vt-{i}", score, task="vt") for i, score in enumerate([0.5, 0.5])),
    ]
    rows = summarise(samples)
    assert [(row["cell"], row["task"]) for row in rows] == [
        (cell, task) for cell in ("full", "kqsvd@0.5") for task in ("all", "niah", "vt")
    ]
    full = row_of(rows, cell="full", task="all")
    assert (full["mean"], full["n"], full["length"], full["budget"]) == (0.875, 6, 1024, None)
    assert (full["diff"], full["diff_low"], full["p_value"], full["detectable"]) == (None, None, None, None)
    niah = row_of(rows, cell="kqsvd@0.5", task="niah")
    assert (niah["mean"], niah["diff"], niah["p_value"]) == (0.5, -0.5, 0.5)
    overall = row_of(rows, cell="kqsvd@0.5", task="all")
    assert overall["mean"] == 0.5
    assert overall["diff"] == pytest.approx((-0.5 - 0.25) / 2)
    assert overall["p_value"] == pytest.approx(2 / 8)
    assert (overall["bytes_ratio"], overall["nbytes"], overall["fixed_nbytes"]) == (0.5, 50.0, 7)


def test_summarise_agrees_with_the_functions_it_stands_for() -> None:
    generator = np.random.default_rng(2)
    scores = {task: generator.random(12).round(1) for task in ("cwe", "fwe")}
    reference = {task: generator.random(12).round(1) for task in ("cwe", "fwe")}
    samples = [
        sample(cell, f"{task}-{index:02d}", float(value), task=task)
        for cell, by_task in (("full", reference), ("xkv@0.25", scores))
        for task, values in by_task.items()
        for index, value in enumerate(values)
    ]
    rows = summarise(samples)
    overall, expected = row_of(rows, cell="xkv@0.25", task="all"), bootstrap_task_mean(scores)
    assert (overall["mean"], overall["low"], overall["high"]) == (expected.mean, expected.low, expected.high)
    one, difference = row_of(rows, cell="xkv@0.25", task="fwe"), paired_difference(scores["fwe"], reference["fwe"])
    assert (one["diff"], one["diff_low"], one["diff_high"]) == (difference.mean, difference.low, difference.high)
    assert one["p_value"] == pytest.approx(difference.p_value)


def test_summarise_does_not_depend_on_the_order_of_samples() -> None:
    generator = np.random.default_rng(3)
    samples = [
        sample(cell, f"{task}-{index}", float(generator.random() < 0.5), task=task)
        for cell in ("full", "ksvd@0.5", "ksvd@0.25")
        for task in ("a", "b")
        for index in range(6)
    ]
    shuffled = [samples[index] for index in generator.permutation(len(samples))]
    assert summarise(samples) == summarise(shuffled)


def test_several_lengths_have_rows_of_their_own_and_a_mean_over_them() -> None:
    samples = [
        sample("full", f"{length}-{index}", score, length=length)
        for length, scores in ((1024, [1.0, 1.0]), (4096, [1.0, 0.0, 0.0, 0.0]))
        for index, score in enumerate(scores)
    ]
    rows = summarise(samples)
    assert row_of(rows, task="niah", length=1024)["mean"] == 1.0
    assert row_of(rows, task="niah", length=4096)["mean"] == 0.25
    assert row_of(rows, task="niah", length=None)["mean"] == 0.625


@pytest.mark.parametrize("lost", ["model", "sample"])
def test_differences_are_null_where_the_baseline_lacks_the_samples(lost: str) -> None:
    samples = [sample("full", "0", 1.0), sample("ksvd@0.5", "0", 0.0), sample("ksvd@0.5", "1", 0.0, task="vt")]
    if lost == "model":
        samples[0]["model"] = "another"
    rows = summarise(samples)
    overall = row_of(rows, cell="ksvd@0.5", task="all")
    assert (overall["mean"], overall["diff"], overall["p_value"]) == (0.0, None, None)
    assert row_of(rows, cell="ksvd@0.5", task="niah")["diff"] == (None if lost == "model" else -1.0)


def test_baseline_of_another_moment_of_compression_is_used() -> None:
    samples = [
        sample("full", "0", 1.0),
        sample("full", "1", 1.0),
        sample("full", "1", 0.5, compress_at="prompt"),
        sample("ksvd@0.5", "0", 0.0, compress_at="prompt"),
        sample("ksvd@0.5", "1", 0.0, compress_at="prompt"),
    ]
    row = row_of(summarise(samples), cell="ksvd@0.5", task="all")
    assert row["diff"] == pytest.approx((-1.0 - 0.5) / 2)


def test_a_sample_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'0' occurs twice in cell 'full'"):
        summarise([sample("full", "0", 1.0), sample("full", "0", 1.0)])


def test_no_samples_no_rows() -> None:
    assert summarise([]) == []
