"""Cells compared on chosen prompts."""

from __future__ import annotations

import json
import sys

import pytest

from kvgauge.errors import UserError
from pipelines.studies import paired_cells
from pipelines.studies.paired_cells import later_prompts


def row(cell, task, index, score):
    full = cell == "full"
    return {
        "cell": cell,
        "method": cell.split("@")[0],
        "budget": None if full else 0.5,
        "combination": cell.startswith("mix"),
        "compress_at": "context",
        "model": "m",
        "task": task,
        "length": 1024,
        "sample_id": f"{task}-1024-{index:04d}",
        "score": score,
        "nbytes": 100 if full else 50,
        "full_nbytes": 100,
        "fixed_nbytes": 0,
    }


ROWS = [
    row(cell, task, index, score)
    for cell, scores in {"full": (1, 1, 1, 0), "kqsvd@0.5": (1, 0, 0, 0), "mix@0.5": (0, 0, 1, 1)}.items()
    for task in ("a", "b")
    for index, score in enumerate(scores)
]


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ROWS))
    return tmp_path


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["paired_cells", *map(str, arguments)])
    paired_cells.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_best_of_each_budget_on_all_prompts(directory, monkeypatch, capsys):
    found = run(monkeypatch, capsys, directory)
    assert found["prompts"] == 8
    cells = {row["cell"]: row for row in found["cells"]}
    assert cells["full"]["share"] == 1 and cells["mix@0.5"]["share"] == pytest.approx(2 / 3)
    [best] = found["differences"]
    assert (best["published"], best["combination"]) == ("kqsvd@0.5", "mix@0.5")
    assert best["diff"] == pytest.approx(0.25)


def test_prompts_that_were_chosen_on_are_left_out(directory, monkeypatch, capsys):
    found = run(monkeypatch, capsys, directory, "--skip", 2, "--pairs", "mix@0.5:full")
    assert found["prompts"] == 4
    assert {row["cell"]: row["mean"] for row in found["cells"]} == {"full": 0.5, "kqsvd@0.5": 0.0, "mix@0.5": 1.0}
    [pair] = found["differences"]
    assert pair["diff"] == pytest.approx(0.5)


def test_rows_are_left_out_by_task():
    assert {row["sample_id"] for row in later_prompts(ROWS, 3)} == {"a-1024-0003", "b-1024-0003"}
    with pytest.raises(UserError, match="lower --skip"):
        later_prompts(ROWS, 4)


def test_only_prompts_that_every_cell_has_met_count():
    found = paired_cells.compare([line for line in ROWS if (line["cell"], line["score"]) != ("full", 0)], [])
    assert found["prompts"] == 6 and {line["cell"]: line["mean"] for line in found["cells"]}["full"] == 1
    with pytest.raises(UserError, match="no prompt was met by every cell"):
        paired_cells.compare([row("full", "a", 0, 1), row("kqsvd@0.5", "a", 1, 1)], [])


@pytest.mark.parametrize("arguments", [("--pairs", "full"), ("--pairs", "full:nothing"), ("--skip", "9")])
def test_mistakes_end_in_one_line(arguments, directory, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["paired_cells", str(directory), *arguments])
    with pytest.raises(SystemExit) as end:
        paired_cells.main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1


def test_a_directory_without_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["paired_cells", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        paired_cells.main()
    assert end.value.code == 2 and "samples.jsonl" in capsys.readouterr().err
