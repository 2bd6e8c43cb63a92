"""Score against a cost, as a Vega specification.

The page's script sets three of its signals: ``hidden``, the methods that are not shown, and ``x_domain`` and
``y_domain``, what is zoomed to (null: everything).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvgauge.report.interactive.points import INK
from kvgauge.report.plots.frontier import non_dominated
from kvgauge.report.plots.style import Palette

Row = dict[str, Any]
Spec = dict[str, Any]

SOFT, LINE, PAPER = "var(--soft)", "var(--line)", "var(--paper)"
HEIGHT = 380
APART, WIDEST = 5.0, 36.0  # pixels between neighbouring methods, and between the outermost at most
NARROW = 420  # pixels; names of cells would cover one another


def score_against_bytes(rows: Sequence[Row], palette: Palette) -> Spec:
    """Every cell with its interval, and the steps of what no cell as small beats; these are named.

    Args:
        rows: of `kvgauge.report.interactive.points`.
        palette: the report's styles.
    """
    return _figure(rows, palette, "bytes_ratio", "cached bytes / bytes of the uncompressed cache")


def score_against_time(rows: Sequence[Row], palette: Palette) -> Spec | None:
    """The same against time per token; None where no compressed cell was timed.

    Args:
        rows: of `kvgauge.report.interactive.points`.
        palette: the report's styles.
    """
    timed = [row for row in rows if row["tpot"] is not None]
    if all(row["method"] == palette.baseline for row in timed):
        return None
    return _figure(timed, palette, "tpot", "time per token / that of the uncompressed cache")


def _figure(rows: Sequence[Row], palette: Palette, x: str, title: str) -> Spec:
    best = non_dominated([row | {"bytes_ratio": row[x]} for row in rows])
    named = {row["cell"] for row in best}
    baseline = f"datum.method === '{palette.baseline}'"
    ends = (min(0.0, *(row["low"] for row in rows)) - 0.02, max(1.0, *(row["high"] for row in rows)) + 0.03)
    # Methods fill one budget to the same bytes: they are set a few pixels apart, as times set themselves apart.
    place = {"x": _at("x", x) | ({} if x == "tpot" else {"offset": {"field": "shift"}}), "y": _at("y", "mean")}
    return {
        "$schema": "https://vega.github.io/schema/vega/v6.json",
        "width": 600,
        "height": HEIGHT,
        "padding": 5,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "background": "transparent",
        "signals": [
            {"name": "hidden", "value": []},
            {"name": "x_domain", "value": None},
            {"name": "y_domain", "value": None},
            {
                "name": "near",
                "value": None,
                "on": [
                    {"events": "@cell:pointerover", "update": "datum.cell"},
                    {"events": "@cell:pointerout", "update": "null"},
                ],
            },
        ],
        "data": [
            {"name": "cells", "values": [_named(row, named) | {"shift": _shift(row, palette)} for row in rows]},
            _filtered("shown", "cells", "indexof(hidden, datum.method) < 0"),
            _filtered("uncompressed", "shown", baseline),
            _filtered("compressed", "shown", f"!({baseline})"),
            {"name": "steps", "values": [{"x": row[x], "y": row["mean"]} for row in best]},
        ],
        "scales": [
            _scale("x", "width", {"data": "cells", "field": x}, type="log", base=2, padding=24),
            _scale("y", "height", list(ends), type="linear"),
        ],
        "axes": [
            _axis("x", "bottom", title, grid=False, tickCount={"signal": "max(2, ceil(width / 90))"}),
            _axis("y", "left", "mean of task means", grid=True),
        ],
        "marks": [
            {
                "type": "group",
                "clip": True,
                "encode": {"update": {"width": {"signal": "width"}, "height": {"signal": "height"}}},
                "marks": [*_references(x == "tpot"), _steps(), _families(place), *_cells(place)],
            }
        ],
    }


def _named(row: Row, named: set[str]) -> Row:
    return row | {"name": row["cell"] if row["cell"] in named else ""}


def _shift(row: Row, palette: Palette) -> float:
    """Pixels to the side of its place that a method's marks are drawn."""
    if row["method"] == palette.baseline:
        return 0.0
    middle = (len(palette.methods) - 1) / 2
    return (palette.methods.index(row["method"]) - middle) * min(APART, WIDEST / len(palette.methods))


def _references(parity: bool) -> list[Spec]:
    """The uncompressed cache's interval as a band and its mean as a dotted line; a line where the costs are equal."""
    across: Spec = {"x": {"value": 0}, "x2": {"signal": "width"}}
    band = across | {"y": _at("y", "low"), "y2": _at("y", "high")} | _values(fill=INK, fillOpacity=0.06)
    mean = across | {"y": _at("y", "mean")} | _values(stroke=INK, strokeOpacity=0.7, strokeDash=[1, 3])
    equal = {"x": {"scale": "x", "value": 1}, "y2": {"signal": "height"}} | _values(y=0, stroke=SOFT, strokeOpacity=0.5)
    marks = [_mark("rect", "uncompressed", band), _mark("rule", "uncompressed", mean)]
    return [*marks, {"type": "rule", "encode": {"update": equal}}] if parity else marks


def _steps() -> Spec:
    look = _values(interpolate="step-after", stroke=SOFT, strokeOpacity=0.22, strokeWidth=6)
    return _mark("line", "steps", {"x": _at("x", "x"), "y": _at("y", "y")} | look)


def _families(place: Spec) -> Spec:
    """A thin line through each method's cells."""
    look = {"stroke": {"field": "colour"}} | _values(strokeWidth=1.5, strokeOpacity=0.5)
    return {
        "type": "group",
        "from": {"facet": {"name": "family", "data": "compressed", "groupby": "method"}},
        "marks": [_mark("line", "family", place | look)],
    }


def _cells(place: Spec) -> list[Spec]:
    """Intervals, marks and names; beside the mouse the mark grows and the other intervals fade."""
    reach = {"x": place["x"], "y": _at("y", "low"), "y2": _at("y", "high"), "stroke": {"field": "colour"}}
    reach["strokeOpacity"] = [{"test": "near && near !== datum.cell", "value": 0.2}, {"value": 0.85}]
    symbol = place | {"shape": {"field": "shape"}, "fill": {"field": "colour"}, "tooltip": {"signal": "datum"}}
    symbol["size"] = {"signal": "datum.size * (near === datum.cell ? 2.2 : 1)"}
    symbol |= _values(stroke=PAPER, strokeWidth=1.2, cursor="pointer")
    name = place | {"text": {"field": "name"}, "opacity": {"signal": f"width < {NARROW} ? 0 : 1"}}
    name |= _values(dx=7, dy=-8, fontSize=11.5, fill=INK)
    return [
        _mark("rule", "compressed", reach | _values(strokeWidth=1.4)),
        _mark("symbol", "shown", symbol, name="cell"),
        _mark("text", "shown", name, interactive=False),
    ]


def _mark(kind: str, data: str, encoding: Spec, **more: Any) -> Spec:
    return {"type": kind, "from": {"data": data}, "encode": {"update": encoding}} | more


def _at(scale: str, field: str) -> Spec:
    return {"scale": scale, "field": field}


def _values(**channels: Any) -> Spec:
    return {channel: {"value": value} for channel, value in channels.items()}


def _filtered(name: str, source: str, test: str) -> Spec:
    return {"name": name, "source": source, "transform": [{"type": "filter", "expr": test}]}


def _scale(name: str, length: str, domain: Any, **more: Any) -> Spec:
    return {"name": name, "range": length, "domain": domain, "domainRaw": {"signal": f"{name}_domain"}} | more


def _axis(scale: str, orient: str, title: str, **more: Any) -> Spec:
    colours = {"labelColor": SOFT, "titleColor": SOFT, "domainColor": SOFT, "tickColor": SOFT, "gridColor": LINE}
    fonts = {"labelFontSize": 12, "titleFontSize": 12.5, "titleFontWeight": "normal", "titlePadding": 8}
    return {"scale": scale, "orient": orient, "title": title, "format": ".3~g"} | colours | fonts | more
