"""From chapters to HTML: the templates beside this file put the page together."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.colors

from kvgauge.report.interactive import vega_script
from kvgauge.report.page.blocks import Scatter, Section
from kvgauge.report.plots.style import SCORES


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
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"base64": _base64, "colour": _colour, "ink": _ink}
    nested = {name for name, value in provenance.items() if isinstance(value, Mapping | list | tuple)}
    interactive = any(isinstance(block, Scatter) for section in sections for block in section.blocks)
    return environment.get_template("page.html.j2").render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        vega=vega_script() if interactive else "",
        facts=[(_spoken(name), value) for name, value in sorted(provenance.items()) if name not in nested],
        documents=[
            (_spoken(name), json.dumps(provenance[name], indent=2, sort_keys=True, ensure_ascii=False, default=str))
            for name in sorted(nested)
        ],
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _colour(score: float) -> str:
    return matplotlib.colors.to_hex(SCORES(score))


def _ink(score: float) -> str:
    """Black or white, whichever is read better on the colour of a score: the scale is dark at both ends."""
    return "#000" if 0.15 < score < 0.85 else "#fff"


def _spoken(name: str) -> str:
    return name.replace("_", " ")
