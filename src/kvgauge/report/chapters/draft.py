"""The page as it comes to be: its chapters, and the pictures and tables that are written beside it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from kvgauge.report import plots, tables
from kvgauge.report.page.blocks import AnyBlock, Block, Section, slug


@dataclass
class Draft:
    """Chapters in order, and the bytes of the pictures by the names of their files."""

    sections: list[Section] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)

    def chapter(self, title: str, blocks: Sequence[AnyBlock], text: str = "") -> None:
        """Add a chapter at the end."""
        self.sections.append(Section(title, text, blocks))

    def figure(self, name: str, figure: Figure, title: str, caption: str) -> Block:
        """A drawing for a chapter, and a picture beside the page; in the page with 256 colours, at a third the size."""
        block = self.picture(name, plots.to_png(figure), title, caption)
        assert block.png is not None
        return replace(block, png=_indexed(block.png))

    def picture(self, name: str, png: bytes, title: str, caption: str, *, photo: bool = False) -> Block:
        """The same for what is a picture already."""
        self.pictures[f"{slug(name)}.png"] = png
        return Block(title, caption, png=png, photo=photo)


def _indexed(png: bytes) -> bytes:
    """A picture with the 256 colours that cover it best."""
    buffer = io.BytesIO()
    picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE)
    picture.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def table_block(table: pd.DataFrame, title: str, caption: str) -> Block:
    """A table in its readable form; what every row repeats is said in the caption."""
    said = tables.constants(table)
    text = f"{caption} {f'All rows: {said}.' if said else ''}".strip()
    return Block(title, text, table=tables.readable(table), keys=tables.numbers(table))
