"""The page in a real browser, opened from disk; skipped where there is no Chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvgauge.report import build_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("no chromium to open the page with", allow_module_level=True)

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--virtual-time-budget=10000"),
    *("--enable-logging=stderr", "--dump-dom"),
)
# After the page's own scripts: clicks as a reader does, and writes down what is then to be seen.
PROBE = """<script type="module">
const seen = {};
const marks = () => [...document.querySelectorAll(".drawn .mark-symbol.cell")].map(
  group => group.querySelectorAll("path").length);
const column = (table, place) => [...table.tBodies[0].rows].map(row => row.cells[place].textContent);
const settled = () => new Promise(resolve => setTimeout(resolve, 200));
await settled();
seen.before = marks();
document.querySelector('.legend [data-method="kqsvd"]').click();
await settled();
seen.hidden = marks();
document.querySelector('.legend [data-method="kqsvd"]').click();
await settled();
seen.again = marks();
const ticks = () => [...document.querySelectorAll(".drawn")].map(
  drawn => [...drawn.querySelectorAll(".role-axis-label text")].map(text => text.textContent).sort().join(" "));
const whole = ticks();
document.querySelector('[data-zoom="in"]').click();
await settled();
seen.zoomed = ticks()[0] !== whole[0] && ticks()[1] === whole[1];
document.querySelector('[data-zoom="all"]').click();
await settled();
seen.reset = ticks()[0] === whole[0];
const table = document.querySelector("table.sortable");
const heads = [...table.tHead.rows[0].cells].map(head => head.textContent);
const place = heads.indexOf("bytes / full");
for (const order of ["descending", "ascending"]) {
  table.tHead.rows[0].cells[place].firstElementChild.click();
  seen[order] = column(table, place);
  seen[`${order}_said`] = table.tHead.rows[0].cells[place].getAttribute("aria-sort");
}
table.tHead.rows[0].cells[heads.indexOf("diff")].firstElementChild.click();
seen.missing_last = column(table, heads.indexOf("diff")).at(-1);
const result = document.createElement("pre");
result.id = "probe";
result.textContent = JSON.stringify(seen);
document.body.append(result);
</script>
"""
# A window cannot be as narrow as a phone; a frame can.
FRAME = """<iframe src="PAGE" style="width:390px;height:844px;border:0"></iframe><pre id="probe"></pre><script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => setTimeout(() => {
  const inside = frame.contentDocument, look = inside.defaultView.getComputedStyle(inside.body);
  const drawn = [...inside.querySelectorAll(".drawn svg")];
  const name = inside.querySelector(".drawn .mark-text.role-mark text");
  document.querySelector("pre").textContent = JSON.stringify({
    width: inside.documentElement.clientWidth, wide: inside.documentElement.scrollWidth,
    drawn: drawn.map(svg => svg.clientWidth),
    ink: look.color, paper: look.backgroundColor, names: inside.defaultView.getComputedStyle(name).fill,
  });
}, 2000));
</script>"""


def opened(page: Path, profile: Path, *flags: str) -> tuple[str, str]:
    """The document after its scripts have run, and what the browser's console says."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={profile}", page.as_uri()]
    # The home directory is the profile's: a browser leaves nothing in the user's.
    environment = os.environ | {"HOME": str(profile)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, write_stages: Callable[[Path], dict[str, list[Path]]]) -> Path:
    root = tmp_path_factory.mktemp("report")
    return build_report(**write_stages(root), out_dir=root / "out", provenance={"configuration": {}})


def test_figures_are_drawn_and_nothing_is_refused_or_fails(page: Path, tmp_path: Path) -> None:
    document, console = opened(page, tmp_path / "profile", "--window-size=1280,900")
    assert console == ""
    assert document.count('<div class="drawn"') == document.count('class="marks"') == 2
    assert "This figure is drawn by a script" not in document
    groups = re.findall(r'<g class="mark-symbol role-mark cell".*?</g>', document, re.DOTALL)
    assert [group.count("<path") for group in groups] == [5, 5]


def probed(page: Path, profile: Path, *flags: str) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    probing = page.with_name("probed.html")
    inside, end, rest = text.rpartition("</body>")
    probing.write_text(inside + PROBE + end + rest, encoding="utf-8")
    document, console = opened(probing, profile, *flags)
    assert console == ""
    return found(document)


def found(document: str) -> dict[str, Any]:
    """What a probe wrote down."""
    [seen] = re.findall(r'<pre id="probe">(.*?)</pre>', document)
    result: dict[str, Any] = json.loads(seen)
    return result


def test_a_reader_hides_zooms_and_sorts(page: Path, tmp_path: Path) -> None:
    seen = probed(page, tmp_path / "profile", "--window-size=1280,900")
    assert (seen["before"], seen["hidden"], seen["again"]) == ([5, 5], [3, 3], [5, 5])
    assert seen["zoomed"] and seen["reset"]
    for order in ("descending", "ascending"):
        assert seen[f"{order}_said"] == order
        assert seen[order] == sorted(seen[order], reverse=order == "descending")
    assert len(set(seen["ascending"])) > 1
    assert seen["missing_last"] == ""


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_a_phone_shows_all_of_it_in_both_colour_schemes(page: Path, tmp_path: Path, scheme: str) -> None:
    framed = page.with_name("framed.html")
    framed.write_text(FRAME.replace("PAGE", page.name), encoding="utf-8")
    flags = (f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", "--allow-file-access-from-files")
    document, console = opened(framed, tmp_path / "profile", *flags)
    assert console == ""
    seen = found(document)
    assert 360 < seen["width"] <= 390  # a scroll bar may stand beside it
    assert seen["wide"] == seen["width"]
    assert len(seen["drawn"]) == 2 and max(seen["drawn"]) < seen["width"]
    ink, paper = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (seen["ink"], seen["paper"]))
    assert (ink > paper) == (scheme == "dark")
    assert seen["names"] == seen["ink"]  # what is drawn takes the page's colours


def test_a_figure_that_cannot_be_drawn_says_where_to_look(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("window.vegaEmbed=") == 1
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace("window.vegaEmbed=", "window.notVega="), encoding="utf-8")
    document, _ = opened(broken, tmp_path / "profile")
    assert document.count("pareto.png beside the page shows score against bytes without one") == 2
