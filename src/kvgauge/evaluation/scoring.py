"""From a benchmark's name to its score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvgauge.errors import unknown
from kvgauge.prompts.samples import Sample

Scorer = Callable[[Sample, str], float]


def _ruler(sample: Sample, answer: str) -> float:
    from kvgauge.benchmarks.ruler.scoring import score

    return score(sample.task, answer, sample.answers)


def _longbench(sample: Sample, answer: str) -> float:
    from kvgauge.benchmarks.longbench import score

    return score(sample.task, answer, sample.answers, sample.facts.get("all_classes"))


SCORERS: dict[str, Scorer] = {
    "ruler": _ruler,
    "longbench": _longbench,
    "longbench_e": _longbench,
    "longbench_stand_in": _longbench,
}


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


def averages(benchmark: str, cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """The averages that a benchmark's papers print beside task means, from rows of cells; None where there are none."""
    if not benchmark.startswith("longbench"):
        return None
    from kvgauge.benchmarks.longbench import averages as of_categories

    return of_categories(cells)
