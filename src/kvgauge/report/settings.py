"""What may be compared: the cells of one model and one moment of compression, with the uncompressed cache's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """The cells of one model and one moment of compression.

    Attributes:
        mark: what tells its figures from those of others, empty where there are no others.
        model, compress_at: what its cells have in common.
        cells: all of them.
        overall: the rows over all lengths where there are several, else those of the one length.
    """

    mark: str
    model: str
    compress_at: str
    cells: list[Row]
    overall: list[Row]

    def samples(self, rows: Sequence[Row]) -> list[Row]:
        """The samples among `rows` that are of its model and its moment of compression."""
        return [row for row in rows if (row["model"], row["compress_at"]) == (self.model, self.compress_at)]


def settings(cells: Sequence[Row], baseline: str = "full") -> Iterator[Setting]:
    """The settings in which rows of cells are compared.

    Args:
        cells: as `kvgauge.evaluation.statistics.summarise` makes them.
        baseline: label of the uncompressed cell.
    """
    pairs = _pairs(cells, baseline)
    for model, compress_at in pairs:
        here = _compared(cells, model, compress_at, baseline)
        overall = [cell for cell in here if cell["length"] is None] or here
        yield Setting(mark(len(pairs) > 1, model, compress_at), model, compress_at, here, overall)


def mark(needed: bool, *names: str) -> str:
    """What is set behind a title to tell it from its likes, with a space before it; empty where it is not needed."""
    said = ", ".join(name for name in names if name)
    return f" ({said})" if needed and said else ""


def _pairs(cells: Sequence[Row], baseline: str) -> list[tuple[str, str]]:
    """Model and moment of compression of every setting; a model with nothing but the baseline has its own."""
    pairs = {(cell["model"], cell["compress_at"]) for cell in cells if cell["cell"] != baseline}
    lonely = {
        (cell["model"], cell["compress_at"]) for cell in cells if cell["model"] not in {pair[0] for pair in pairs}
    }
    return sorted(pairs | lonely)


def _compared(cells: Sequence[Row], model: str, compress_at: str, baseline: str) -> list[Row]:
    """The cells of one setting; an uncompressed run filed under another moment of compression stands in."""
    of_model = [cell for cell in cells if cell["model"] == model]
    here = [cell for cell in of_model if cell["compress_at"] == compress_at]
    if any(cell["cell"] == baseline for cell in here):
        return here
    elsewhere = [cell for cell in of_model if cell["cell"] == baseline]
    return [cell for cell in elsewhere if cell["compress_at"] == elsewhere[0]["compress_at"]] + here
