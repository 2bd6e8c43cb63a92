"""Which cells dominate which: at most the same bytes, and a better score with 95% confidence on the same samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from kvgauge.evaluation.statistics import CHUNK, DIFFERENCES, Floats, stratified_intervals

Row = dict[str, Any]

SIZE_TOLERANCE = 1.02  # a cell may take this much more than its budget


class Comparison:
    """The scores of all cells of one model and one moment of compression, sample by sample.

    Args:
        samples: their rows, with ``cell``, ``task``, ``length``, ``sample_id``, ``score``, ``nbytes``, ``full_nbytes``,
            ``budget``, and ``combination`` where it is known. Only samples that every cell has are compared.
    """

    def __init__(self, samples: Iterable[Mapping[str, Any]]) -> None:
        names = ("cell", "budget", "task", "length", "sample_id", "score", "nbytes", "full_nbytes")
        frame = pd.DataFrame.from_records([{name: row[name] for name in names} for row in rows_of(samples)])
        # No prompt stands for a cell that has not met it.
        scores = frame.pivot(index="cell", columns=["task", "length", "sample_id"], values="score").dropna(axis=1)
        scores = scores.sort_index(axis=1)
        shared = frame.set_index(["task", "length", "sample_id"]).loc[list(scores.columns)]
        sizes = shared.groupby("cell")[["nbytes", "full_nbytes"]].sum()
        self.cells: list[str] = list(scores.index)
        ratios = sizes["nbytes"] / sizes["full_nbytes"]
        self.ratios: dict[str, float] = {str(cell): float(ratio) for cell, ratio in ratios.items()}
        self._scores: Floats = scores.to_numpy(dtype=np.float64)
        strata: dict[tuple[str, int], list[int]] = {}
        columns: Any = scores.columns
        for position, (task, length, _) in enumerate(columns):
            strata.setdefault((task, length), []).append(position)
        self._strata = [np.array(positions) for positions in strata.values()]
        tasks = [task for task, _ in strata]
        # A task weighs the same however many lengths it has.
        self._weights = np.array([1.0 / (len(set(tasks)) * tasks.count(task)) for task in tasks])

    @property
    def samples(self) -> int:
        """Prompts that every cell has met."""
        return int(self._scores.shape[1])

    def means(self) -> dict[str, float]:
        """The mean of task means of every cell."""
        by_stratum = [self._scores[:, positions].mean(axis=1) for positions in self._strata]
        return dict(zip(self.cells, np.stack(by_stratum, axis=1) @ self._weights, strict=True))

    def differences(
        self, pairs: Sequence[tuple[str, str]], *, seed: int = 0, resamples: int = 10_000, confidence: float = 0.95
    ) -> list[Row]:
        """The mean of the paired differences of each pair, first minus second, with its interval.

        Args:
            pairs: labels of cells.
            seed: of the resampling.
            resamples: number of bootstrap resamples.
            confidence: coverage aimed at, of each interval by itself.
        """
        place = {cell: index for index, cell in enumerate(self.cells)}
        rows: list[Row] = []
        for start in range(0, len(pairs), CHUNK):
            part = pairs[start : start + CHUNK]
            first, second = ([place[pair[side]] for pair in part] for side in (0, 1))
            values = self._scores[first] - self._scores[second]
            strata = [values[:, positions] for positions in self._strata]
            figures = stratified_intervals(strata, self._weights, DIFFERENCES, seed, resamples, confidence)
            for (cell, other), mean, low, high in zip(part, *figures, strict=True):
                rows.append({"cell": cell, "other": other, "diff": mean, "diff_low": low, "diff_high": high})
        return rows

    def dominance(self, **settings: Any) -> list[Row]:
        """The pairs in which the first takes at most the bytes of the second and its score is better, low end above 0.

        Args:
            settings: of `differences`.
        """
        pairs = [
            (cell, other)
            for cell in self.cells
            for other in self.cells
            if cell != other and self.ratios[cell] <= self.ratios[other]
        ]
        return [
            row | {"bytes_ratio": self.ratios[row["cell"]], "other_bytes_ratio": self.ratios[row["other"]]}
            for row in self.differences(pairs, **settings)
            if row["diff_low"] > 0
        ]


def rows_of(samples: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The samples as a list.

    Raises:
        ValueError: there are none.
    """
    found = list(samples)
    if not found:
        raise ValueError("no samples to compare cells on")
    return found


def settings(samples: Iterable[Mapping[str, Any]], baseline: str = "full") -> Iterator[tuple[str, str, list[Row]]]:
    """Model, moment of compression and samples of every comparison, the uncompressed cache in each of its model."""
    rows = [dict(row) for row in samples]
    moments = sorted({(row["model"], row["compress_at"]) for row in rows if row["cell"] != baseline})
    for model, compress_at in moments:
        here = [row for row in rows if row["model"] == model and row["compress_at"] == compress_at]
        if not any(row["cell"] == baseline for row in here):
            elsewhere = [row for row in rows if row["model"] == model and row["cell"] == baseline]
            here += [row for row in elsewhere if row["compress_at"] == elsewhere[0]["compress_at"]]
        yield model, compress_at, here


def best_by_budget(samples: Sequence[Row], comparison: Comparison, **options: Any) -> list[Row]:
    """For each budget the best published method, the best combination, and their paired difference.

    A cell competes at every budget that its measured bytes keep to, whatever budget it was asked for. Both are the best
    of several on these very samples, so their scores flatter them; the difference is not corrected for the choice.

    Args:
        samples: of the comparison.
        comparison: of these samples.
        options: of `Comparison.differences`.
    """
    budgets = sorted({row["budget"] for row in samples if row["budget"] is not None})
    means = comparison.means()
    known = {row["cell"]: row for row in samples if row["cell"] in means}
    chosen: list[Row] = []
    for budget in reversed(budgets):
        fields: Row = {"budget": budget}
        for kind, combined in (("published", False), ("combination", True)):
            fitting = [
                cell
                for cell, row in known.items()
                if bool(row.get("combination")) == combined and comparison.ratios[cell] <= SIZE_TOLERANCE * budget
            ]
            if fitting:
                best = max(sorted(fitting), key=lambda cell: means[cell])
                fields |= {kind: best, f"{kind}_score": means[best], f"{kind}_bytes_ratio": comparison.ratios[best]}
        if "published" in fields and "combination" in fields:
            [found] = comparison.differences([(fields["combination"], fields["published"])], **options)
            fields |= {name: found[name] for name in ("diff", "diff_low", "diff_high")}
        chosen.append(fields)
    return chosen
