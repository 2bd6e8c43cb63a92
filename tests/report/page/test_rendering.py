"""The page stands alone and says what it is given."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser

import pandas as pd
import pytest

from kvgauge.report.page import Block, Card, Cards, HeatMap, HeatMaps, Item, Scatter, Section, render, slug
from kvgauge.report.plots import heatmap, to_png


class Links(HTMLParser):
    """Every address that the page would fetch or lead to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag != "a":
            self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


TABLE = pd.DataFrame({"cell": ["full", "b"], "all": ["0.5 [0.4, 0.6]", ""]})
KEYS = pd.DataFrame({"cell": [None, None], "all": [0.51, None]}, dtype=object)
SPEC = {"data": [{"values": [{"cell": "</script><b>"}]}]}
SCATTER = Scatter(
    "S", "c", [("Score", SPEC)], [{"method": "full", "colour": "var(--ink)", "shape": "circle"}], "no script"
)


def test_page_fetches_nothing() -> None:
    png = to_png(heatmap([[1.0, 2.0]], "m"))
    page = render(
        "T", "", [Section("A part", blocks=[Block("F", "c", png=png), Block("G", "d", table=TABLE)])], {"config": {}}
    )
    links = Links(page)
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links.found)
    assert not {"link", "iframe", "object", "embed"} & set(links.tags)
    assert "url(" not in page
    assert "@import" not in page
    embedded = next(link for link in links.found if link.startswith("data:"))
    assert base64.b64decode(embedded.partition(",")[2]) == png
    assert "#a-part" in links.found


def test_scripts_are_inside_the_page_and_the_browser_may_load_nothing() -> None:
    plain = render("T", "", [Section("A", blocks=[Block(table=TABLE)])], {})
    drawn = render("T", "", [Section("A", blocks=[SCATTER])], {})
    for page in (plain, drawn):
        assert not Links(page).sources
        policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
        assert policy is not None
        allowed = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
        assert allowed.pop("default-src") == "'none'"
        assert allowed == {"img-src": "data:", "style-src": "'unsafe-inline'", "script-src": "'unsafe-inline'"}
    assert "vegaEmbed" in drawn and "vegaEmbed" not in plain


def test_text_is_escaped() -> None:
    table = pd.DataFrame({"<b>": ["<script>alert(1)</script>"]})
    blank = Links(render("a < b", "", [Section("S", blocks=[Block(table=TABLE)])], {"note": "<i>"}))
    page = render("a < b", "", [Section("S", blocks=[Block(table=table)])], {"note": "<i>"})
    assert Links(page).tags.count("script") == blank.tags.count("script")
    assert "<script>alert" not in page
    assert "a &lt; b" in page
    assert "&lt;i&gt;" in page


def test_a_figure_s_data_come_back_and_cannot_end_their_script() -> None:
    page = render("T", "", [Section("S", blocks=[SCATTER])], {})
    [data] = re.findall(r'<script type="application/json">(.*?)</script>', page)
    assert json.loads(data) == SPEC
    assert "no script" in page
    assert re.search(r'<button[^>]*data-method="full"[^>]*>', page)


def test_tables_sort_by_numbers_and_not_by_how_they_read() -> None:
    page = render("T", "", [Section("S", blocks=[Block(table=TABLE, keys=KEYS)])], {})
    assert re.findall(r"<th[^>]*><button type=\"button\">(.*?)</button></th>", page) == ["cell", "all"]
    assert '<td data-key="0.51">0.5 [0.4, 0.6]</td>' in page
    assert '<td class="text">full</td>' in page
    assert page.count("data-key") == 1  # a missing number has none


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


def test_a_card_says_what_it_knows() -> None:
    card = Card(
        "at most 0.5", "xkv@0.5", "Not settled against 1 of 2:", ["ksvd@0.5"], "0.7", (0.6, 0.7, 0.8), 0.75,
        [Item("TPOT", "0.9", "at 1,024 tokens")],
    )  # fmt: skip
    page = render("T", "", [Section("S", blocks=[Cards("", "how", "all", [card, Card("at most 0.1")])])], {})
    for said in ("at most 0.5", "xkv@0.5", "Not settled against 1 of 2:", "<li>ksvd@0.5</li>", "at 1,024 tokens"):
        assert said in page
    assert 'class="reach" style="left:60.00%;right:20.00%"' in page
    assert 'class="reference" style="left:75.00%"' in page
    assert page.count('<article class="card none">') == 1


def test_a_heat_map_has_a_square_per_score() -> None:
    half = HeatMap("full", "0.5 on 2 samples", ["1K", "2K"], [("0", [1.0, None]), ("1", [0.0, 0.5])])
    page = render("T", "", [Section("S", blocks=[HeatMaps("", "c", [half], "depth", "tokens")])], {})
    squares = re.findall(r'<td style="background:(#\w+);color:(#\w+)" title="([^"]*)">([\d.]+)</td>', page)
    assert [(title, text) for _, _, title, text in squares] == [
        ("depth 0, tokens 1K: 1", "1"),
        ("depth 1, tokens 1K: 0", "0"),
        ("depth 1, tokens 2K: 0.5", "0.5"),
    ]
    assert len({colour for colour, *_ in squares}) == 3
    assert [ink for _, ink, _, _ in squares] == ["#fff", "#fff", "#000"]
    assert "depth 0, tokens 2K: not measured" in page


def test_slug() -> None:
    assert slug("Error by layer (m, batch 1)") == "error-by-layer-m-batch-1"
    assert slug("…") == "untitled"


def test_a_picture_is_shown_at_the_size_it_was_drawn_for() -> None:
    figure = heatmap([[1.0, 2.0]], "m")
    assert Block(png=to_png(figure)).width == pytest.approx(figure.get_size_inches()[0] * 96, abs=1)
