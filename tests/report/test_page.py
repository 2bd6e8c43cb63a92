"""The page stands alone and says what it is given."""

from __future__ import annotations

import base64
from html.parser import HTMLParser

import pandas as pd
import pytest

from kvgauge.report.page import Block, Section, render, slug
from kvgauge.report.plots import heatmap, to_png


class Links(HTMLParser):
    """Every address that the page would fetch or lead to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_page_fetches_nothing() -> None:
    png = to_png(heatmap([[1.0, 2.0]], "m"))
    table = pd.DataFrame({"cell": ["full"], "all": ["0.5"]})
    page = render(
        "T", "", [Section("A part", blocks=[Block("F", "c", png=png), Block("G", "d", table=table)])], {"config": {}}
    )
    links = Links(page)
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links.found)
    assert not {"script", "link", "iframe"} & set(links.tags)
    assert "url(" not in page
    assert "@import" not in page
    embedded = next(link for link in links.found if link.startswith("data:"))
    assert base64.b64decode(embedded.partition(",")[2]) == png
    assert "#a-part" in links.found


def test_text_is_escaped() -> None:
    table = pd.DataFrame({"<b>": ["<script>alert(1)</script>"]})
    page = render("a < b", "", [Section("S", blocks=[Block(table=table)])], {"note": "<i>"})
    assert "script" not in Links(page).tags
    assert "a &lt; b" in page
    assert "&lt;i&gt;" in page


def test_provenance_is_shown_with_sorted_keys() -> None:
    facts = {
        "git_revision": "deadbeef",
        "config_hash": "abc",
        "config": {"z": 1, "a": {"y": 2}},
        "libraries": {"x": "1"},
    }
    page = render("T", "", [], facts)
    assert page.index("abc") < page.index("deadbeef")
    assert page.index("&#34;a&#34;") < page.index("&#34;z&#34;")
    assert render("T", "", [], dict(reversed(facts.items()))) == page


def test_slug() -> None:
    assert slug("Error by layer (m, batch 1)") == "error-by-layer-m-batch-1"
    assert slug("…") == "untitled"


def test_a_picture_is_shown_at_the_size_it_was_drawn_for() -> None:
    figure = heatmap([[1.0, 2.0]], "m")
    assert Block(png=to_png(figure)).width == pytest.approx(figure.get_size_inches()[0] * 96, abs=1)
