from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvgauge.artifacts import write_json, write_lines
from kvgauge.errors import UserError
from kvgauge.evaluation.statistics import summarise
from pipelines.studies.needle_map import draw, main


def write(directory: Path, model: str = "m", depth: bool = True) -> Path:
    rows: list[dict[str, Any]] = []
    for cell, budget, found in (("full", None, 1.0), ("ksvd@0.5", 0.5, 0.0)):
        for length in (512, 1024):
            for place in (0.0, 1.0):
                row = {"cell": cell, "method": cell.partition("@")[0], "budget": budget, "compress_at": "context"}
                row |= {"model": model, "sample_id": f"{length}-{place}", "task": f"depth_{place:g}", "length": length}
                row |= {"score": max(found, place), "nbytes": 5, "full_nbytes": 10, "fixed_nbytes": 0}
                row |= {"nbytes_by_part": {}, "answer": "", "answers": [], "kind": "retrieval"}
                rows.append(row | ({"depth": place} if depth else {}))
    directory.mkdir()
    write_lines(directory / "samples.jsonl", rows)
    write_json(directory / "cells.json", summarise(rows))
    return directory


def test_a_picture_and_the_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(write(tmp_path / "a")), str(tmp_path / "map.png")])
    assert json.loads(capsys.readouterr().out) == {"full": 1.0, "ksvd@0.5": 0.5}
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has a depth: evaluate benchmark=needle"):
        draw([write(tmp_path / "bare", depth=False)], tmp_path / "map.png")
    with pytest.raises(UserError, match="of 2 models or moments"):
        draw([write(tmp_path / "a"), write(tmp_path / "b", model="other")], tmp_path / "map.png")
