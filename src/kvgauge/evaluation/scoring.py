"""From a benchmark's name to its score."""

from __future__ import annotations

from collections.abc import Callable

from kvgauge.errors import unknown
from kvgauge.evaluation.samples import Sample

Scorer = Callable[[Sample, str], float]


def _ruler(sample: Sample, answer: str) -> float:
    from kvgauge.benchmarks.scoring import score

    return score(sample.task, answer, sample.answers)


SCORERS: dict[str, Scorer] = {"ruler": _ruler}


def scorer(benchmark: str) -> Scorer:
    """The function (sample, answer) → score in [0, 1] of a benchmark.

    Raises:
        UserError: an unknown benchmark.
    """
    if benchmark not in SCORERS:
        raise unknown("benchmark", benchmark, SCORERS)
    return SCORERS[benchmark]


def limit(benchmark: str) -> str:
    """What to do with a prompt that is longer than the model's positions: ``refuse``, or ``truncate`` its middle.

    LongBench's own scripts cut the middle out; a RULER prompt without its middle may lack its needle.
    """
    return "truncate" if benchmark.startswith("longbench") else "refuse"
