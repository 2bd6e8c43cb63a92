"""The command that puts two sets of results side by side."""

from __future__ import annotations

import json
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kvgauge.artifacts import finish
from kvgauge.compare import main
from kvgauge.evaluation.statistics import summarise

Row = dict[str, Any]


def write(directory: Path, cells: dict[str, list[float]], prompts: str = "p", sinks: int = 0) -> Path:
    """A finished evaluate directory: for each cell its scores, half of two tasks each."""
    rows = [
        {
            "cell": cell,
            "method": cell.split("@")[0],
            "budget": None if cell == "full" else 0.5,
            "compress_at": "context",
            "model": "m",
            "task": task,
            "length": 1024,
            "sample_id": f"{task}-1024-{index:04d}",
            "answers": ["7"],
            "score": float(score),
            "nbytes": 100 if cell == "full" else 50,
            "full_nbytes": 100,
            "nbytes_by_part": {"keys": 50},
            "fixed_nbytes": 0,
        }
        for cell, scores in cells.items()
        for index, score in enumerate(scores)
        for task in ("cwe", "vt")
    ]
    directory.mkdir(parents=True)
    (directory / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "cells.json").write_text(json.dumps(summarise(rows, resamples=50)))
    configs = {cell: {"method": {"name": cell.split("@")[0], "sinks": sinks}} for cell in cells}
    finish(directory, "evaluate", {"prompts": prompts, "cells": list(cells)}, cells=configs, environment={"git": "r"})
    return directory


@pytest.fixture
def a(tmp_path: Path) -> Path:
    write(tmp_path / "a" / "evaluate" / "one", {"full": [1] * 12, "ksvd@0.5": [0] * 12})
    write(tmp_path / "a" / "evaluate" / "two", {"eigen@0.5": [0, 1], "xkv@0.5": [1, 1]})
    return tmp_path / "a"


@pytest.fixture
def b(tmp_path: Path) -> Path:
    write(tmp_path / "b" / "evaluate" / "one", {"full": [1] * 10, "ksvd@0.5": [1] * 10, "kqsvd@0.5": [1, 1]}, sinks=4)
    write(tmp_path / "b" / "evaluate" / "two", {"xkv@0.5": [1, 1]}, prompts="q")
    return tmp_path / "b"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_tables_in_the_terminal(a: Path, b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, a, b)
    lines = out.splitlines()
    assert lines[:2] == [f"A: {a} (4 cells, 56 samples)", f"B: {b} (4 cells, 48 samples)"]
    assert "In both. On the samples that both have, B is better in 1 and worse in 0 of 2 cells; 1 not settled." in lines
    [head] = [line for line in lines if line.startswith("cell") and "B minus A" in line]
    [row] = [line for line in lines if line.startswith("ksvd@0.5")]
    # Aligned: what stands below a title begins where it does.
    for title, value in [
        ("B minus A", "1.0"),
        ("B is", "better"),
        ("samples", "20"),
        ("A lacks", "0"),
        ("B lacks", "4"),
    ]:
        assert row[head.index(title) :].startswith(value), (title, row)
    assert "method.sinks" in row
    for part, cell in [("Gained.", "kqsvd@0.5"), ("Lost.", "eigen@0.5"), ("Not paired.", "xkv@0.5")]:
        start = next(index for index, line in enumerate(lines) if line.startswith(part))
        assert lines[start + 4].startswith(cell)
    assert "4: other prompts" in out and "Evaluate both on the same prompts" in out


def test_one_json_object(a: Path, b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [line] = run(capsys, a, b, "--json").splitlines()
    found = json.loads(line)
    assert found["a"]["where"] == str(a) and found["b"]["directories"] == [
        str(b / "evaluate" / n) for n in ("one", "two")
    ]
    assert [row["cell"] for row in found["compared"]] == ["full", "ksvd@0.5"]
    ksvd = found["compared"][1]
    assert (ksvd["diff"], ksvd["n"], ksvd["b_lacks"], ksvd["changed"]) == (1.0, 20, 4, ["method.sinks"])
    assert 0 < ksvd["diff_low"] < ksvd["diff_high"] == 1.0
    assert [[row["cell"] for row in found[part]] for part in ("gained", "lost", "unpaired")] == [
        ["kqsvd@0.5"],
        ["eigen@0.5"],
        ["xkv@0.5"],
    ]


class Page(HTMLParser):
    """The addresses that a page would fetch, and its chapters and table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self.anchors += [value or "" for name, value in attrs if tag == "section" and name == "id"]

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def test_a_page_that_stands_alone(a: Path, b: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "page.html"
    out = run(capsys, a, b, "--html", path)
    assert "kqsvd@0.5" in out
    page = Page(path.read_text(encoding="utf-8"))
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert any(link.startswith("data:image/png;base64,") for link in page.links)
    assert {"in-both", "gained", "lost", "not-paired"} <= set(page.anchors)
    assert {"B minus A", "better", "eigen@0.5", "kqsvd@0.5", "4: other prompts"} <= set(page.words)
    assert any(str(a) in word for word in page.words)
    first = path.read_bytes()
    run(capsys, a, b, "--html", path)
    assert path.read_bytes() == first


def test_the_same_results_differ_in_nothing(a: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, a, a, "--json"))
    assert [row["diff"] for row in found["compared"]] == [0.0] * 4
    assert not (found["gained"] or found["lost"] or found["unpaired"])
    assert all(row["changed"] == [] and row["a_lacks"] == row["b_lacks"] == 0 for row in found["compared"])


def test_nothing_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write(tmp_path / "one", {"full": [1]}), write(tmp_path / "two", {"ksvd@0.5": [1]})
    out = run(capsys, one, two, "--html", tmp_path / "page.html")
    assert "In both" not in out and "Gained." in out and "Lost." in out
    assert "in-both" not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{a}"], "the following arguments are required: B"),
        (["{a}", "{a}", "--htm"], "--htm"),
        (["{a}", "{a}/nothing"], "neither a directory nor a git revision"),
        (["{a}", "{a}/evaluate/one/meta.json"], "holds no finished results"),
        (["{a}", "{a}", "--html", "{a}"], "name another file with --html"),
        (["{a}", "{a}", "--html", "{a}/evaluate/one/meta.json/page.html"], "name another file with --html"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str], words: str, a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([argument.format(a=a) for argument in arguments])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert words in error and error.startswith("kvgauge: ") and error.count("\n") == 1


def test_as_a_module(a: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", str(a), str(a), "--json"])
    monkeypatch.delitem(sys.modules, "kvgauge.compare")
    runpy.run_module("kvgauge.compare", run_name="__main__")
    assert len(json.loads(capsys.readouterr().out)["compared"]) == 4
