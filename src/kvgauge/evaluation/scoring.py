"""What a benchmark says about answers, checked: figures that cannot be right never reach a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvgauge.contract.benchmark import AVERAGE_KEYS, Benchmark
from kvgauge.errors import UserError
from kvgauge.prompts.samples import Sample


def score(benchmark: Benchmark, sample: Sample, answer: str) -> float:
    """The score of one answer, from 0 to 1.

    Raises:
        UserError: the benchmark cannot score the sample, or its score is outside.
    """
    value = benchmark.score(sample, answer)
    if not 0.0 <= value <= 1.0:
        raise UserError(
            f"benchmark {benchmark.name} scores an answer to {sample.id} with {value}: scores run from 0 to 1, "
            f"correct its score method"
        )
    return value


def averages(benchmark: Benchmark, cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """The benchmark's own averages of rows of cells, under its name; None where it has none.

    Raises:
        UserError: a row of them lacks what the report needs.
    """
    rows = benchmark.averages(cells)
    if rows is None:
        return None
    for row in rows:
        lacking = [key for key in AVERAGE_KEYS if key not in row]
        if lacking:
            raise UserError(
                f"an average of benchmark {benchmark.name} has no {', '.join(lacking)}: correct its averages method"
            )
    return [{"benchmark": benchmark.name, **row} for row in rows]
