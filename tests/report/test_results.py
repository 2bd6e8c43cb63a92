"""Evaluate directories and sessions as sides of a comparison."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvgauge.artifacts import finish
from kvgauge.errors import UserError
from kvgauge.report.results import read_results

Row = dict[str, Any]
Write = Callable[..., Path]


@pytest.fixture
def finished(write_evaluate: Callable[[Path, list[Row]], Path]) -> Write:
    """Writes a finished evaluate directory."""

    def write(directory: Path, samples: list[Row], prompts: str = "p", git: str = "r") -> Path:
        write_evaluate(directory, samples)
        cells = {row["cell"]: {"method": {"name": row["method"]}} for row in samples}
        finish(directory, "evaluate", {"prompts": prompts}, cells=cells, environment={"git": git})
        return directory

    return write


@pytest.fixture
def samples(make_samples: Callable[..., list[Row]]) -> list[Row]:
    return make_samples(("ksvd", "xkv"), (0.5,), (1024,), 4)


def of(samples: list[Row], *methods: str) -> list[Row]:
    return [row for row in samples if row["method"] in methods]


def test_one_directory(tmp_path: Path, finished: Write, samples: list[Row]) -> None:
    directory = finished(tmp_path / "x", of(samples, "ksvd"), prompts="p")
    found = read_results(str(directory))
    assert found.samples == [row | {"prompts": "p"} for row in of(samples, "ksvd")]
    assert found.directories == [str(directory)] and found.cells == 1
    assert found.configs == {("smollm2-135m", "context", "ksvd@0.5"): {"method": {"name": "ksvd"}}}
    assert found.facts()["environments"] == [{"git": "r"}]


def test_a_session_is_the_union_of_its_evaluations(
    tmp_path: Path, finished: Write, samples: list[Row], capsys: pytest.CaptureFixture[str]
) -> None:
    finished(tmp_path / "evaluate" / "one", of(samples, "full", "ksvd"), git="r")
    finished(tmp_path / "evaluate" / "two", of(samples, "full", "xkv"), git="s")
    unfinished = finished(tmp_path / "evaluate" / "three", of(samples, "full"))
    (unfinished / "meta.json").unlink()
    # The prompts are kept in a file of the same name, which is no result.
    prompts = tmp_path / "prompts" / "p"
    prompts.mkdir(parents=True)
    (prompts / "samples.jsonl").write_text(json.dumps({"id": "x"}) + "\n")
    finish(prompts, "prompts", {})
    found = read_results(str(tmp_path))
    assert len(found.samples) == len(samples) and found.cells == 3
    assert found.environments == [{"git": "r"}, {"git": "s"}]
    assert capsys.readouterr().err == f"left out, not finished: {unfinished}\n"
    assert read_results(str(tmp_path / "evaluate")).samples == found.samples


def test_the_same_cell_on_other_prompts_is_kept_apart(tmp_path: Path, finished: Write, samples: list[Row]) -> None:
    finished(tmp_path / "evaluate" / "one", of(samples, "ksvd"), prompts="p")
    finished(tmp_path / "evaluate" / "two", [row | {"score": 1.0} for row in of(samples, "ksvd")], prompts="q")
    found = read_results(str(tmp_path))
    assert len(found.samples) == 2 * len(of(samples, "ksvd"))
    assert {row["prompts"] for row in found.samples} == {"p", "q"}


def test_contradicting_evaluations_are_refused(tmp_path: Path, finished: Write, samples: list[Row]) -> None:
    finished(tmp_path / "evaluate" / "one", of(samples, "ksvd"))
    finished(tmp_path / "evaluate" / "two", [row | {"score": 0.5} for row in of(samples, "ksvd")])
    with pytest.raises(UserError, match=r"differs or repeats in .*one and .*two: leave one directory out"):
        read_results(str(tmp_path))


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "evaluate").mkdir()
    with pytest.raises(UserError, match="holds no finished results of the evaluate stage"):
        read_results(str(tmp_path))


def test_half_written_results(tmp_path: Path, finished: Write, samples: list[Row]) -> None:
    directory = finished(tmp_path / "x", samples)
    (directory / "samples.jsonl").write_text('{"cell": ')
    with pytest.raises(UserError, match=r"samples\.jsonl is damaged"):
        read_results(str(directory))
