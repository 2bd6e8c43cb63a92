from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvgauge.errors import UserError
from kvgauge.evaluation.store import AnswerStore
from pipelines.studies.crash_recovery import answers, killed_run

# Stores an answer, and leaves a half-written one behind, every few milliseconds until it is killed.
WRITER = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
for number in range(100000):
    (folder / f".{number}.json-half").write_text("{")
    (folder / f"{number}.json").write_text(str(number))
    time.sleep(0.005)
"""


def test_only_whole_answers_count(tmp_path: Path) -> None:
    AnswerStore(tmp_path).put("cell", "sample", {"text": ""})
    (tmp_path / "cell" / ".sample.json-x1").write_text("{")
    assert list(answers(tmp_path)) == [tmp_path / "cell" / "sample.json"]


def test_a_run_is_killed_when_it_has_answered(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "cell")]
    first = killed_run(command, tmp_path, wait_for=2, pause=0.0)
    assert len(first) >= 2
    assert answers(tmp_path) == first  # nobody writes any more


def test_a_run_that_ends_too_early_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ended with code 0 before"):
        killed_run([sys.executable, "-c", ""], tmp_path, wait_for=1, pause=0.0)
