"""What a person sees while the engine works: how much is left, and a live line for every cell."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType

from tqdm import tqdm

from kvgauge.contract.benchmark import Benchmark
from kvgauge.evaluation.cell import Cell
from kvgauge.evaluation.scoring import score
from kvgauge.prompts.samples import Sample


class Progress:
    """Bars on stderr: one for the run, with the time that is left, and on a terminal one for every cell.

    Args:
        cells: of the run.
        todo: answers that are not stored yet, for every cell.
        benchmark: gives the scores of the running mean.
        show: False shows nothing.
    """

    def __init__(self, cells: Sequence[Cell], todo: Sequence[int], benchmark: Benchmark, show: bool = True) -> None:
        live = show and sys.stderr.isatty()
        self.benchmark = benchmark
        self.total = tqdm(
            total=sum(todo), desc="evaluate", unit="answer", disable=not show, mininterval=0.1 if live else 10.0
        )
        self.bars = {
            cell.fingerprint: tqdm(total=count, desc=f"  {cell.label}", unit="answer", disable=not live, leave=False)
            for cell, count in zip(cells, todo, strict=True)
        }
        self.scores: dict[str, list[float]] = {cell.fingerprint: [] for cell in cells}

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for bar in (*self.bars.values(), self.total):
            bar.close()

    def answered(self, cell: Cell, sample: Sample, text: str) -> None:
        """Count an answer and show the running mean of its cell."""
        scores, bar = self.scores[cell.fingerprint], self.bars[cell.fingerprint]
        scores.append(score(self.benchmark, sample, text))
        bar.set_postfix_str(f"mean {sum(scores) / len(scores):.2f}", refresh=False)
        bar.update()
        self.total.set_postfix_str(f"{cell.label} {sample.task}", refresh=False)
        self.total.update()
