"""The latency stage as a command: its file, its last line, what it refuses, and going on after an interruption."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import kvgauge
from kvgauge import artifacts, provenance
from kvgauge.artifacts import META, read_json
from kvgauge.configuration import CONF_DIR
from kvgauge.measure import latency
from kvgauge.report.collect import collect
from pipelines.latency import run

ROOT = Path(__file__).resolve().parents[2]
GRID = [
    "model=tiny/llama",
    "latency.context_lengths=[70,130]",
    "latency.decode_steps=2",
    "latency.warmup=0",
    "latency.repeats=1",
]


def config(root: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("config", [*GRID, f"artifacts={root}", *overrides])


@pytest.fixture
def root(tmp_path: Path, tiny, fit) -> Path:
    """Artifacts with the fit of kqsvd on tiny/llama."""
    method = kvgauge.build_method("kqsvd")
    model, tokenizer = kvgauge.load_model("tiny/llama")
    directory = artifacts.begin(tmp_path / "fit" / "by-hand")
    fit(method, "tiny/llama").save(directory / "projections.safetensors")
    wanted = provenance.fit_config(config(tmp_path), model, tokenizer, method)
    artifacts.finish(directory, "fit", wanted)
    return tmp_path


def test_rows_and_the_last_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(config(root, "budgets=[0.5,0.25]"))
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    directory = Path(line["directory"])
    rows = read_json(directory / "latency.json")
    assert [(row["context_length"], row["cell"]) for row in rows] == [
        (length, cell) for length in (70, 130) for cell in (*latency.UNCOMPRESSED, "kqsvd@0.5", "kqsvd@0.25")
    ]
    assert [row["cell"] for row in line["rows"]] == [row["cell"] for row in rows]
    assert {row["model"] for row in rows} == {"tiny/llama"}
    assert all(row["peak_bytes"] is None for row in rows)
    assert sorted(path.name for path in directory.iterdir()) == ["latency.json", META]
    assert len(collect(latency_dirs=[directory]).latency) == 10  # the report can read it


def test_a_finished_run_is_not_repeated(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    run(config(root))
    first = capsys.readouterr().out
    monkeypatch.setattr(latency, "measure_point", None)  # a second measurement would fail
    run(config(root))
    assert capsys.readouterr().out == first


def test_a_broken_run_goes_on_with_the_next_point(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    measure, seen = latency.measure_point, []

    def interrupted(*arguments):
        if seen:
            raise KeyboardInterrupt
        seen.append(arguments[4])
        return measure(*arguments)

    monkeypatch.setattr(latency, "measure_point", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config(root))
    directory = next((root / "latency").iterdir())
    assert not (directory / META).exists()
    kept = next((directory / "points").iterdir()).read_text()

    later = []
    monkeypatch.setattr(latency, "measure_point", lambda *arguments: later.append(arguments[4]) or measure(*arguments))
    run(config(root))
    assert (seen, later) == ([70], [130])
    assert read_json(directory / "latency.json")[:4] == json.loads(kept)
    capsys.readouterr()


def test_peak_memory_comes_from_processes_of_their_own(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(config(root, "latency.context_lengths=[70]", "latency.peak=true"))
    rows = read_json(Path(json.loads(capsys.readouterr().out.splitlines()[-1])["directory"]) / "latency.json")
    assert len(rows) == 4
    assert all(row["peak_bytes"] >= row["before_bytes"] > 0 for row in rows)


def refusal(root: Path, *overrides: str) -> str:
    command = [sys.executable, "-m", "pipelines.latency", *GRID, f"artifacts={root}", *overrides]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_a_grid_beyond_the_memory_is_refused_before_it_starts(root: Path) -> None:
    line = refusal(root, "latency.context_lengths=[64,100000]", "latency.memory_limit=100000000")
    assert "1 of 2 latency points do not fit in memory: batch 1 at 100000 tokens needs about" in line
    assert not (root / "latency").exists()


def test_a_missing_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(kvgauge.UserError, match=r"kvgauge fit method=kqsvd"):
        run(config(tmp_path))
