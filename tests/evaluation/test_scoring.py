from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from kvgauge.contract.benchmark import SETTING, Benchmark
from kvgauge.errors import UserError
from kvgauge.evaluation.scoring import averages, score
from kvgauge.prompts.samples import Sample

SampleMaker = Callable[..., list[Sample]]
SETTING_OF_A_CELL = dict.fromkeys(SETTING, "x")


@dataclass(frozen=True, kw_only=True)
class Fixed(Benchmark):
    """Gives what it is told to give."""

    name: str = "fixed"
    value: float = 0.0
    rows: Any = None

    def prompts(self, counter: Any) -> Iterator[Sample]:
        yield from ()

    def score(self, sample: Sample, answer: str) -> float:
        return self.value

    def averages(self, cells: Sequence[Mapping[str, Any]]) -> Any:
        return self.rows


@pytest.mark.parametrize("value", [0.0, 0.3, 1, True])
def test_a_score_is_the_benchmarks(make_samples: SampleMaker, value: float) -> None:
    [sample] = make_samples(1)
    assert score(Fixed(value=value), sample, "an answer") == value


@pytest.mark.parametrize("value", [-0.1, 1.01, 37.5, float("nan")])
def test_a_score_that_cannot_be_is_refused(make_samples: SampleMaker, value: float) -> None:
    [sample] = make_samples(1)
    with pytest.raises(UserError, match=f"benchmark fixed scores an answer to {sample.id} with {value}"):
        score(Fixed(value=value), sample, "an answer")


def test_averages_stand_under_the_benchmarks_name() -> None:
    assert averages(Fixed(), []) is None
    row = SETTING_OF_A_CELL | {"average": "overall", "mean": 0.5, "language": "en"}
    assert averages(Fixed(rows=[row]), []) == [row | {"benchmark": "fixed"}]


def test_an_average_that_the_report_could_not_show_is_refused() -> None:
    row = SETTING_OF_A_CELL | {"mean": 0.5}
    with pytest.raises(UserError, match="an average of benchmark fixed has no average: correct"):
        averages(Fixed(rows=[row]), [])
