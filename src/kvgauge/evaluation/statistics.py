"""What a set of scores supports: intervals, paired differences, and how small a difference could have been seen.

A score is a number in [0, 1], one per sample. Samples are few (tens per task), so a mean without its interval says
little. Three choices are made here, and every table of the project rests on them:

- The interval of a mean is the percentile bootstrap (Efron & Tibshirani 1993, ch. 13), resampled within each task
  (stratified) when the quantity is a mean of task means.
- The bootstrap has nothing to say about a task whose scores are all equal: it would claim certainty. There the exact
  binomial bound of Clopper & Pearson (1934) takes its place: after n equal scores, at most a share
  ``p = 1 - (alpha/2)**(1/n)`` of the population may be different, and the mean may move by ``p`` times the distance
  to the end of the scale. For 5 of 5 right this is [0.48, 1], not [1, 1]. Several such tasks are pooled (the same
  bound with the sum of their samples; by the inequality of means, equal shares are the least favourable case), and
  the two parts are joined by adding squared distances from the mean (MOVER: Zou & Donner 2008, Statistics in
  Medicine 27).
- A method is compared with the uncompressed cache on the same samples: the mean of the paired differences with its
  interval, and the exact two-sided sign test on the samples whose score changed. p-values are not corrected for the
  number of comparisons.

Everything is a pure function of its input and a seed.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.optimize
import scipy.stats

Floats = npt.NDArray[np.float64]
_Indices = npt.NDArray[np.intp]
# The samples of one row: for each of its tasks, for each of the task's lengths, their positions in the columns.
_Part = list[list[_Indices]]
_Columns = dict[str, Floats]

SCORES = (0.0, 1.0)
DIFFERENCES = (-1.0, 1.0)
# Digits kept of a computed figure: far below any meaning, far above the rounding of a sum whose order may vary.
DECIMALS_KEPT = 10
CHUNK = 256
NUMERIC = ("score", "difference", "nbytes", "full_nbytes", "fixed_nbytes")


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its confidence interval, in the units of the scores."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, its confidence interval, and the p-value of the exact sign test."""

    mean: float
    low: float
    high: float
    p_value: float


def bootstrap_mean(scores: npt.ArrayLike, seed: int = 0, resamples: int = 10_000, confidence: float = 0.95) -> Interval:
    """The mean of one set of scores with its percentile-bootstrap interval.

    Args:
        scores: shape (n,), each in [0, 1]; n may be 1.
        seed: of the resampling.
        resamples: number of bootstrap resamples.
        confidence: coverage aimed at.

    Raises:
        ValueError: there are no scores, or one is outside [0, 1] or not a number.
    """
    return bootstrap_task_mean({"": scores}, seed, resamples, confidence)


def bootstrap_task_mean(
    scores_by_task: Mapping[str, npt.ArrayLike], seed: int = 0, resamples: int = 10_000, confidence: float = 0.95
) -> Interval:
    """The mean of task means with its stratified interval: each task is resampled within itself.

    Tasks weigh the same however many samples they have. Tasks whose scores are all equal enter by their exact bound
    (see the module's docstring).

    Args:
        scores_by_task: for each task its scores, shape (n_task,), each in [0, 1].
        seed: of the resampling.
        resamples: number of bootstrap resamples.
        confidence: coverage aimed at.

    Raises:
        ValueError: no tasks, a task without scores, or a score outside [0, 1] or not a number.
    """
    strata = [_checked(scores_by_task[task], SCORES)[np.newaxis] for task in sorted(scores_by_task)]
    if not strata:
        raise ValueError("no tasks to take the mean of")
    weights = np.full(len(strata), 1.0 / len(strata))
    mean, low, high = stratified_intervals(strata, weights, SCORES, seed, resamples, confidence)
    return Interval(float(mean[0]), float(low[0]), float(high[0]))


def paired_difference(
    a: npt.ArrayLike, b: npt.ArrayLike, seed: int = 0, resamples: int = 10_000, confidence: float = 0.95
) -> Difference:
    """The mean of ``a - b`` over the same samples, its interval, and the exact sign test.

    Args:
        a: shape (n,), scores in [0, 1].
        b: shape (n,), scores of the same samples in the same order.
        seed: of the resampling.
        resamples: number of bootstrap resamples.
        confidence: coverage aimed at.

    Raises:
        ValueError: the shapes differ, there are no scores, or one is outside [0, 1] or not a number.
    """
    first, second = _checked(a, SCORES), _checked(b, SCORES)
    if first.shape != second.shape:
        raise ValueError(f"paired scores must have one shape, not {first.shape} and {second.shape}")
    differences = first - second
    mean, low, high = stratified_intervals(
        [differences[np.newaxis]], np.ones(1), DIFFERENCES, seed, resamples, confidence
    )
    return Difference(float(mean[0]), float(low[0]), float(high[0]), sign_test(differences))


def sign_test(differences: npt.ArrayLike) -> float:
    """p-value of the exact two-sided sign test: are gains as likely as losses?

    Ties say nothing about the direction and are dropped; where all are ties the p-value is 1.

    Args:
        differences: shape (n,), paired differences.
    """
    values = np.asarray(differences, dtype=np.float64)
    gains, losses = int((values > 0).sum()), int((values < 0).sum())
    return _sign_test_pvalue(gains, gains + losses)


def smallest_detectable_difference(differences: npt.ArrayLike, power: float = 0.8, alpha: float = 0.05) -> float:
    """The true mean difference that a paired t-test on as many samples as these would find with chance `power`.

    The spread is taken from the differences; the power function is that of the noncentral t distribution. Where all
    differences are equal (or there is one sample) there is no spread to go by: the answer is then the share of
    samples that would have to change by a whole point for at least one change to be seen with chance `power`,
    ``1 - (1 - power)**(1/n)``. An answer above 1 means that these samples cannot show any difference of scores.

    Args:
        differences: shape (n,), paired differences, each in [-1, 1].
        power: chance of finding the difference.
        alpha: two-sided level of the test.

    Raises:
        ValueError: there are no differences, or one is outside [-1, 1] or not a number.
    """
    values = _checked(differences, DIFFERENCES)
    if (values == values[0]).all():
        return 1.0 - (1.0 - power) ** (1.0 / values.size)
    spread = float(values.std(ddof=1))
    return _detectable_noncentrality(values.size, power, alpha) * spread / math.sqrt(values.size)


def significant_decimals(low: float, high: float) -> int:
    """Decimals that an interval supports, by the rounding rule of the Particle Data Group (Review, Introduction 5.3).

    Of the half-width two digits are kept if its three leading digits are at most 354, else one; a half-width that
    starts with 950 or more rounds up to 10 of the next decimal. At least 0, and 3 for an interval without width.
    """
    half_width = (high - low) / 2
    if not half_width > 0:
        return 3
    exponent = math.floor(math.log10(half_width))
    leading = round(half_width / 10.0 ** (exponent - 2))
    digits = 2 if leading <= 354 or leading >= 950 else 1
    first_decimal = -exponent - (1 if leading >= 950 else 0)
    return max(0, first_decimal + digits - 1)


def format_interval(mean: float, low: float, high: float) -> str:
    """``mean [low, high]`` with no more digits than the interval supports, e.g. ``0.83 [0.65, 0.96]``."""
    decimals = significant_decimals(low, high)
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    middle, bottom, top = (f"{round(value, decimals) + 0.0:.{decimals}f}" for value in (mean, low, high))
    return f"{middle} [{bottom}, {top}]"


def summarise(
    samples: Iterable[Mapping[str, Any]],
    baseline: str = "full",
    *,
    seed: int = 0,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> list[dict[str, Any]]:
    """Rows of figures from rows of samples: one for each cell and task, and for the mean of task means.

    Samples are rows with at least ``cell``, ``method``, ``budget``, ``compress_at``, ``model``, ``sample_id``,
    ``task``, ``length``, ``score``, ``nbytes``, ``full_nbytes`` and ``fixed_nbytes``. A cell is told apart by its
    label, model and ``compress_at``. Its differences pair each sample with the same ``sample_id`` of the baseline cell
    of the same model (with the same ``compress_at`` if the baseline has that sample there, else with any, as an
    uncompressed cache has no moment of compression); they are null for the baseline itself and wherever the baseline
    lacks a sample of the row.

    Rows with a ``prompt`` are answers to one prompt, sampled several times: its score is their mean (pass@1 where
    scores are 0 or 1, Chen et al., arXiv 2107.03374, equation 1 with k = 1), and prompts are what is resampled, so
    that an interval holds what prompts differ by and what repeated answers to one of them differ by.

    Each row has: ``cell``, ``method``, ``budget``, ``compress_at``, ``model``, ``task`` ("all" for the mean of task
    means), ``length`` (tokens; null in the additional rows over all lengths, which are there only if there are
    several: each task's mean is then the mean over its lengths), ``n``, ``mean``, ``low``, ``high``, ``diff``,
    ``diff_low``, ``diff_high``, ``p_value`` (sign test over all pairs of the row), ``detectable``
    (`smallest_detectable_difference` of all pairs of the row), ``bytes_ratio`` (sum of cached bytes / sum of
    uncompressed bytes), ``nbytes`` and ``full_nbytes`` (means per sample), and ``fixed_nbytes`` (largest).

    Raises:
        ValueError: a cell has a sample twice, or a score is outside [0, 1] or not a number.
    """
    columns = ["model", "compress_at", "cell", "method", "budget", "sample_id", "task", "length"]
    columns += ["score", "nbytes", "full_nbytes", "fixed_nbytes"]
    chosen = [{name: sample[name] for name in columns} | {"prompt": sample.get("prompt")} for sample in samples]
    frame = pd.DataFrame.from_records(chosen, columns=[*columns, "prompt"])
    if frame.empty:
        return []
    frame["budget"] = pd.to_numeric(frame["budget"])
    _refuse_duplicates(frame)
    frame = _by_prompt(frame)
    frame["difference"] = frame["score"] - _baseline_scores(frame, baseline)
    frame.loc[frame["cell"] == baseline, "difference"] = np.nan
    frame["is_baseline"] = frame["cell"] == baseline
    # The order of the samples must not matter, and the baseline leads.
    frame["smaller"] = -frame["budget"].fillna(np.inf)
    order = ["model", "compress_at", "is_baseline", "method", "smaller", "cell", "length", "task", "sample_id"]
    frame = frame.sort_values(order, ascending=[name != "is_baseline" for name in order], ignore_index=True)

    distinct = sorted(int(length) for length in frame["length"].unique())
    lengths: list[int | None] = [None, *distinct] if len(distinct) > 1 else [*distinct]
    column: _Columns = {name: frame[name].to_numpy(dtype=np.float64) for name in NUMERIC}
    rows: list[dict[str, Any]] = []
    parts: list[_Part] = []
    cells: dict[tuple[str, str, str], dict[tuple[str, int], list[int]]] = defaultdict(lambda: defaultdict(list))
    labels = zip(frame["model"], frame["compress_at"].astype(str), frame["cell"], strict=True)
    for position, (label, task, length) in enumerate(zip(labels, frame["task"], frame["length"], strict=True)):
        cells[label][task, int(length)].append(position)
    for strata in cells.values():
        setting = _setting(frame.iloc[next(iter(strata.values()))[0]])
        for length in lengths:
            tasks: dict[str, list[_Indices]] = defaultdict(list)
            for (task, stratum_length), positions in strata.items():
                if length in (None, stratum_length):
                    tasks[task].append(np.array(positions))
            if not tasks:
                continue
            by_task = {task: [tasks[task]] for task in sorted(tasks)}
            for name, part in [("all", [tasks[task] for task in by_task]), *by_task.items()]:
                parts.append(part)
                rows.append(setting | {"task": name, "length": length} | _descriptive(column, part))

    names = ("mean", "low", "high")
    _fill(rows, parts, column["score"], names, SCORES, seed, resamples, confidence)
    paired = [index for index, part in enumerate(parts) if not np.isnan(column["difference"][_joined(part)]).any()]
    rows_paired, parts_paired = [rows[index] for index in paired], [parts[index] for index in paired]
    names = ("diff", "diff_low", "diff_high")
    _fill(rows_paired, parts_paired, column["difference"], names, DIFFERENCES, seed, resamples, confidence)
    for row, part in zip(rows_paired, parts_paired, strict=True):
        differences = column["difference"][_joined(part)]
        row["p_value"] = round(sign_test(differences), DECIMALS_KEPT)
        row["detectable"] = round(smallest_detectable_difference(differences), DECIMALS_KEPT)
    return rows


def _checked(values: npt.ArrayLike, bounds: tuple[float, float]) -> Floats:
    """`values` as a float64 vector, shape (n,), n >= 1, all within `bounds`."""
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(f"expected a vector of at least one score, not shape {vector.shape}")
    if not ((vector >= bounds[0]) & (vector <= bounds[1])).all():
        raise ValueError(f"scores must lie between {bounds[0]:g} and {bounds[1]:g}")
    return vector


def stratified_intervals(
    strata: Sequence[Floats],
    weights: Floats,
    bounds: tuple[float, float],
    seed: int,
    resamples: int,
    confidence: float,
) -> tuple[Floats, Floats, Floats]:
    """Means and interval ends of many cells at once, each the weighted sum of its strata's means.

    All cells of a call share their resamples: one matrix product per stratum takes the place of a loop over cells.

    Args:
        strata: for each stratum its values, shape (cells, n_stratum).
        weights: shape (strata,), adding up to 1.
        bounds: the ends of the scale.
        seed: of the resampling; each stratum has its own stream.
        resamples: number of bootstrap resamples.
        confidence: coverage aimed at.

    Returns:
        mean, low and high, each of shape (cells,).
    """
    cells = strata[0].shape[0]
    half_alpha = (1.0 - confidence) / 2
    mean = np.zeros(cells)
    draws = np.zeros((cells, resamples))
    for index, (values, weight) in enumerate(zip(strata, weights, strict=True)):
        n = values.shape[1]
        counts = np.random.default_rng([seed, index]).multinomial(n, np.full(n, 1.0 / n), size=resamples)
        mean += weight * values.mean(axis=1)
        draws += values @ (counts.T * (weight / n))
    low, high = np.quantile(draws, [half_alpha, 1.0 - half_alpha], axis=1)

    down = np.hypot(np.maximum(mean - low, 0.0), _unseen(strata, weights, -bounds[0], -1.0, half_alpha))
    up = np.hypot(np.maximum(high - mean, 0.0), _unseen(strata, weights, bounds[1], 1.0, half_alpha))
    low, high = np.maximum(mean - down, bounds[0]), np.minimum(mean + up, bounds[1])
    return mean.round(DECIMALS_KEPT), low.round(DECIMALS_KEPT), high.round(DECIMALS_KEPT)


def _unseen(strata: Sequence[Floats], weights: Floats, end: float, sign: float, half_alpha: float) -> Floats:
    """How far the mean may move towards one end of the scale through values that constant strata have not shown.

    Args:
        strata: for each stratum its values, shape (cells, n_stratum).
        weights: shape (strata,).
        end: the end of the scale, times `sign`.
        sign: 1 towards the upper end, -1 towards the lower.
        half_alpha: the chance allowed on this side.

    Returns:
        The distance, shape (cells,); 0 where no stratum is constant.
    """
    constant = np.stack([(values == values[:, :1]).all(axis=1) for values in strata])
    reach = np.stack([weight * (end - sign * values[:, 0]) for values, weight in zip(strata, weights, strict=True)])
    reach = np.where(constant, reach, 0.0)
    moving = reach > 0
    sizes = np.array([values.shape[1] for values in strata])[:, np.newaxis]
    pooled = moving.sum(axis=0) * np.where(moving, sizes, sizes.max()).min(axis=0)
    share = 1.0 - half_alpha ** (1.0 / np.maximum(pooled, 1))
    distance: Floats = share * moving.sum(axis=0) * reach.max(axis=0)
    return distance


@functools.cache
def _sign_test_pvalue(gains: int, changed: int) -> float:
    return float(scipy.stats.binomtest(gains, changed, 0.5).pvalue) if changed else 1.0


@functools.cache
def _detectable_noncentrality(n: int, power: float, alpha: float) -> float:
    """Noncentrality at which the two-sided t-test on n samples has the wished power."""
    degrees = n - 1
    critical = float(scipy.stats.t.ppf(1 - alpha / 2, degrees))

    def excess(noncentrality: float) -> float:
        # A significant difference of the wrong sign is no finding, so the far tail does not count.
        return float(scipy.stats.nct.sf(critical, degrees, noncentrality)) - power

    return float(scipy.optimize.brentq(excess, 0.0, 4.0 * (critical + 1.0)))


def _refuse_duplicates(frame: pd.DataFrame) -> None:
    twice = frame.duplicated(["model", "compress_at", "cell", "sample_id"])
    if twice.any():
        first = frame[twice].iloc[0]
        raise ValueError(f"sample {first['sample_id']!r} occurs twice in cell {first['cell']!r} of {first['model']!r}")


def _by_prompt(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for the repeated answers of a cell to a prompt, with the means of their figures."""
    if frame["prompt"].isna().all():
        return frame
    frame["sample_id"] = frame["prompt"].fillna(frame["sample_id"])
    keys = ["model", "compress_at", "cell", "method", "budget", "sample_id", "task", "length"]
    figures = {"score": "mean", "nbytes": "mean", "full_nbytes": "mean", "fixed_nbytes": "max"}
    return frame.groupby(keys, dropna=False, sort=False).agg(figures).reset_index()


def _baseline_scores(frame: pd.DataFrame, baseline: str) -> pd.Series[float]:
    """For each row the baseline's score of the same sample and model, NaN where there is none."""
    reference = frame.loc[frame["cell"] == baseline, ["model", "compress_at", "sample_id", "score"]]
    same = frame[["model", "compress_at", "sample_id"]].merge(
        reference, how="left", on=["model", "compress_at", "sample_id"]
    )
    anywhere = reference.sort_values("compress_at").drop_duplicates(["model", "sample_id"])
    other = frame[["model", "sample_id"]].merge(
        anywhere[["model", "sample_id", "score"]], how="left", on=["model", "sample_id"]
    )
    return same["score"].fillna(other["score"]).set_axis(frame.index)


def _setting(sample: pd.Series[Any]) -> dict[str, Any]:
    """What the rows of one cell have in common."""
    return {
        "cell": str(sample["cell"]),
        "method": str(sample["method"]),
        "budget": None if pd.isna(sample["budget"]) else float(sample["budget"]),
        "compress_at": None if pd.isna(sample["compress_at"]) else str(sample["compress_at"]),
        "model": str(sample["model"]),
    }


def _joined(part: _Part) -> _Indices:
    return np.concatenate([positions for lengths in part for positions in lengths])


def _descriptive(column: _Columns, part: _Part) -> dict[str, Any]:
    """What needs no inference, and null for the figures that do until they are filled in."""
    here = _joined(part)
    nbytes, full_nbytes = column["nbytes"][here], column["full_nbytes"][here]
    return {
        "n": here.size,
        **dict.fromkeys(("mean", "low", "high", "diff", "diff_low", "diff_high", "p_value", "detectable")),
        "bytes_ratio": round(float(nbytes.sum() / full_nbytes.sum()), DECIMALS_KEPT),
        "nbytes": round(float(nbytes.mean()), 1),
        "full_nbytes": round(float(full_nbytes.mean()), 1),
        "fixed_nbytes": int(column["fixed_nbytes"][here].max()),
    }


def _fill(
    rows: Sequence[dict[str, Any]],
    parts: Sequence[_Part],
    column: Floats,
    names: tuple[str, str, str],
    bounds: tuple[float, float],
    seed: int,
    resamples: int,
    confidence: float,
) -> None:
    """Write mean, low and high of `column` into the rows, many rows of one shape at a time."""
    batches: dict[tuple[tuple[int, float], ...], list[tuple[int, list[Floats]]]] = defaultdict(list)
    for index, part in enumerate(parts):
        strata = [_checked(column[positions], bounds) for lengths in part for positions in lengths]
        # A task weighs the same however many lengths it has, a length within its task likewise.
        weights = [1.0 / (len(part) * len(lengths)) for lengths in part for _ in lengths]
        shape = tuple((values.size, weight) for values, weight in zip(strata, weights, strict=True))
        batches[shape].append((index, strata))
    for shape, members in batches.items():
        weight_vector = np.array([weight for _, weight in shape])
        for start in range(0, len(members), CHUNK):
            chunk = members[start : start + CHUNK]
            stacked = [np.stack([strata[s] for _, strata in chunk]) for s in range(len(shape))]
            figures = stratified_intervals(stacked, weight_vector, bounds, seed, resamples, confidence)
            for position, (index, _) in enumerate(chunk):
                for name, values in zip(names, figures, strict=True):
                    rows[index][name] = float(values[position])
