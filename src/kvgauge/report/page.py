"""One HTML page that opens from disk: pictures and tables are inside it, and it asks nothing of a network."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from kvgauge.report.plots.style import DPI


@dataclass(frozen=True)
class Block:
    """A figure (PNG bytes) or a table of text, with its caption."""

    title: str = ""
    caption: str = ""
    png: bytes | None = None
    table: pd.DataFrame | None = None

    @property
    def width(self) -> int:
        """Width in CSS pixels (96 to the inch) of a picture drawn at the figures' resolution."""
        if self.png is None:
            return 0
        # A PNG's first chunk begins with its width in pixels.
        return round(int.from_bytes(self.png[16:20], "big") * 96 / DPI)


@dataclass(frozen=True)
class Section:
    """A chapter of the page."""

    title: str
    text: str = ""
    blocks: list[Block] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """The chapter's name within the page's address."""
        return slug(self.title)


def slug(title: str) -> str:
    """A title as lower-case words joined with hyphens, for file names and anchors."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "untitled"


def render(title: str, subtitle: str, sections: Sequence[Section], provenance: Mapping[str, Any]) -> str:
    """The page as HTML.

    Args:
        title: of the page.
        subtitle: one line below it, may be empty.
        sections: the chapters, in order.
        provenance: what made the numbers, e.g. ``config``, ``config_hash``, ``git_revision``, ``libraries``. Plain
            values are listed; mappings and lists are shown as JSON with sorted keys.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")
    nested = {name for name, value in provenance.items() if isinstance(value, Mapping | list | tuple)}
    return environment.get_template("page.html.j2").render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        facts=[(_spoken(name), value) for name, value in sorted(provenance.items()) if name not in nested],
        documents=[
            (_spoken(name), json.dumps(provenance[name], indent=2, sort_keys=True, ensure_ascii=False, default=str))
            for name in sorted(nested)
        ],
    )


def _spoken(name: str) -> str:
    return name.replace("_", " ")
