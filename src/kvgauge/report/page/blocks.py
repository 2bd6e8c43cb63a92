"""What a page is made of: chapters of pictures, tables, cards, interactive figures and heat maps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import pandas as pd

from kvgauge.report.plots.style import DPI


@dataclass(frozen=True)
class Block:
    """A figure (PNG bytes) or a table of text, with its caption.

    Attributes:
        title: above it.
        caption: below it.
        png: the picture.
        photo: whether the picture keeps its colours where the reader's scheme is dark; drawings on white are inverted.
        table: cells of text.
        keys: for each cell of `table` the number that its column is sorted by, None for text.
    """

    title: str = ""
    caption: str = ""
    png: bytes | None = None
    photo: bool = False
    table: pd.DataFrame | None = None
    keys: pd.DataFrame | None = None

    @property
    def template(self) -> str:
        """The part that shows it."""
        return "picture.html.j2" if self.png is not None else "table.html.j2"

    @property
    def width(self) -> int:
        """Width in CSS pixels (96 to the inch) of a picture drawn at the figures' resolution."""
        if self.png is None:
            return 0
        # A PNG's first chunk begins with its width in pixels.
        return round(int.from_bytes(self.png[16:20], "big") * 96 / DPI)

    @property
    def columns(self) -> list[tuple[str, bool]]:
        """The table's columns, and whether they are of text; without `keys` the first is."""
        if self.table is None:
            return []
        if self.keys is None:
            return [(str(name), place == 0) for place, name in enumerate(self.table.columns)]
        return [(str(name), bool(self.keys[name].isna().all())) for name in self.table.columns]

    @property
    def rows(self) -> list[list[tuple[str, Any]]]:
        """The table's cells with their sorting keys."""
        if self.table is None:
            return []
        texts = self.table.to_numpy(dtype=object).tolist()
        keys = [[None] * len(row) for row in texts] if self.keys is None else self.keys.to_numpy(dtype=object).tolist()
        return [list(zip(row, numbers, strict=True)) for row, numbers in zip(texts, keys, strict=True)]


@dataclass(frozen=True)
class Item:
    """A name, its value, and what is said of it in small print."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Card:
    """An answer at a glance.

    Attributes:
        head: what was asked.
        answer: in a word; empty where there is none.
        verdict: in a sentence.
        names: listed behind the verdict.
        score: as text, empty where there is none.
        reach: low end, mean and high end of the score, on the scale from 0 to 1.
        reference: the score to compare with.
        items: what else there is to know.
    """

    head: str
    answer: str = ""
    verdict: str = ""
    names: Sequence[str] = ()
    score: str = ""
    reach: tuple[float, float, float] | None = None
    reference: float | None = None
    items: Sequence[Item] = ()


@dataclass(frozen=True)
class Cards:
    """Cards side by side, with a text above and a caption below them."""

    title: str
    caption: str
    text: str
    cards: Sequence[Card]
    template: ClassVar[str] = "cards.html.j2"


@dataclass(frozen=True)
class Scatter:
    """Interactive figures that share a legend.

    Attributes:
        title, caption: above and below them.
        figures: a title and a Vega specification each.
        legend: method, colour and shape, in order.
        instead: what is said where scripts do not run.
    """

    title: str
    caption: str
    figures: Sequence[tuple[str, dict[str, Any]]]
    legend: Sequence[dict[str, Any]]
    instead: str
    template: ClassVar[str] = "scatter.html.j2"


@dataclass(frozen=True)
class HeatMap:
    """A matrix of scores in [0, 1].

    Attributes:
        title: what it is of.
        note: beside the title.
        columns: their names.
        rows: a name and a score per column each, None where nothing was measured.
    """

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float | None]]]


@dataclass(frozen=True)
class HeatMaps:
    """Heat maps side by side on one scale of colours."""

    title: str
    caption: str
    maps: Sequence[HeatMap]
    row_name: str
    column_name: str
    template: ClassVar[str] = "heat_maps.html.j2"


AnyBlock: TypeAlias = Block | Cards | Scatter | HeatMaps


@dataclass(frozen=True)
class Section:
    """A chapter of the page."""

    title: str
    text: str = ""
    blocks: Sequence[AnyBlock] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """The chapter's name within the page's address."""
        return slug(self.title)


def slug(title: str) -> str:
    """A title as lower-case words joined with hyphens, for file names and anchors."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "untitled"
