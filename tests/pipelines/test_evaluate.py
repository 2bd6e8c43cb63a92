from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import kvgauge
from kvgauge import artifacts, provenance
from kvgauge.artifacts import read_json, read_lines
from kvgauge.configuration import CONF_DIR
from kvgauge.errors import UserError
from kvgauge.report.collect import collect
from pipelines.evaluate import run

ROOT = Path(__file__).resolve().parents[2]
PANEL = "panel=[{method: full},{method: ksvd, budget: 0.5}]"
SETTING = ["model=tiny/llama", "benchmark.tasks=[niah_single_1]", "benchmark.lengths=[256]", "benchmark.samples=5"]
Evaluate = Callable[..., Path]


def config(root: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("config", [*SETTING, f"artifacts={root}", *overrides])


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"niah_single_1-256-{index:04d}",
            "task": "niah_single_1",
            "context": "The grass is green. The sky is blue. " * (3 + index),
            "question": "What is the special magic number for it?",
            "answer_prefix": "It is",
            "answers": [str(index)],
            "max_new_tokens": 5,
            "length": 256,
            "tokens": 256,
        }
        for index in range(count)
    ]


def write_prompts(root: Path, prompts: list[dict[str, Any]]) -> Path:
    cfg = config(root)
    tokenizer = kvgauge.load_tokenizer("tiny/llama")
    directory = artifacts.begin(root / "prompts" / "by-hand")
    artifacts.write_lines(directory / "samples.jsonl", prompts)
    artifacts.finish(directory, "prompts", provenance.prompts_config(cfg, tokenizer))
    return directory


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and projections, as the stages before this one leave them."""
    root = tmp_path_factory.mktemp("artifacts")
    write_prompts(root, rows(5))
    model, tokenizer = kvgauge.load_model("tiny/llama")
    tokens = torch.randint(3, 259, (2, 128), generator=torch.Generator().manual_seed(0))
    moments, method = kvgauge.collect(model, [tokens]), kvgauge.build_method("ksvd")
    fitted = method.fit(moments, model)
    assert fitted is not None
    directory = artifacts.begin(root / "fit" / "ksvd")
    fitted.save(directory / "projections.safetensors")
    artifacts.finish(directory, "fit", provenance.fit_config(config(root), model, tokenizer, method))
    return root


@pytest.fixture
def root(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared artifacts with nothing evaluated."""
    return Path(shutil.copytree(prepared, tmp_path / "artifacts"))


@pytest.fixture
def evaluate(root: Path) -> Evaluate:
    def of(*overrides: str) -> Path:
        before = set((root / "evaluate").glob("*"))
        run(config(root, *overrides))
        [directory] = set((root / "evaluate").glob("*")) - before
        return directory

    return of


def results(directory: Path) -> list[bytes]:
    return [(directory / name).read_bytes() for name in ("samples.jsonl", "cells.json")]


def test_one_method(evaluate: Evaluate, root: Path) -> None:
    directory = evaluate("method=ksvd", "method.budget=0.5")
    samples, cells = read_lines(directory / "samples.jsonl"), read_json(directory / "cells.json")
    model = kvgauge.load_model("tiny/llama")[0]
    assert {row["weights_nbytes"] for row in cells} == {sum(parameter.nbytes for parameter in model.parameters())}
    assert [row["sample_id"] for row in samples] == [row["id"] for row in rows(5)]
    assert {row["cell"] for row in samples} == {row["cell"] for row in cells} == {"ksvd@0.5"}
    assert {row["task"] for row in cells} == {"niah_single_1", "all"}
    assert all(row["bytes_ratio"] == 0.5 and row["n"] == 5 and row["p_value"] is not None for row in cells)
    assert len(read_lines(directory / "timings.jsonl")) == 5
    meta = read_json(directory / "meta.json")
    assert (meta["samples"], meta["truncated_samples"]) == (5, 0)
    assert collect([directory]).samples == samples  # the report reads it


def test_a_panel_and_runs_of_its_own_give_the_same_figures(evaluate: Evaluate, root: Path) -> None:
    panel = evaluate(PANEL)
    shutil.rmtree(root / "answers")
    alone = [evaluate("method=full"), evaluate("method=ksvd", "method.budget=0.5")]
    for name in ("samples.jsonl", "cells.json"):
        read = read_lines if name.endswith("l") else read_json
        assert read(panel / name) == [row for directory in alone for row in read(directory / name)]


def test_budgets_are_cells_of_one_method(evaluate: Evaluate) -> None:
    directory = evaluate("method=ksvd", "budgets=[0.75,0.25]")
    assert [row["cell"] for row in read_lines(directory / "samples.jsonl")] == ["ksvd@0.75"] * 5 + ["ksvd@0.25"] * 5


def test_without_a_baseline_there_are_no_differences(evaluate: Evaluate) -> None:
    directory = evaluate("method=ksvd", "baseline=false")
    assert all(row["diff"] is None for row in read_json(directory / "cells.json"))


def test_a_second_run_computes_nothing(evaluate: Evaluate, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = evaluate(PANEL)
    before = results(directory)
    stored = {path: path.stat().st_mtime_ns for path in (root / "answers").rglob("*.json")}
    run(config(root, PANEL))
    assert "up to date" in capsys.readouterr().err
    shutil.rmtree(directory)
    assert results(evaluate(PANEL)) == before
    assert {path: path.stat().st_mtime_ns for path in (root / "answers").rglob("*.json")} == stored


def test_without_a_store_nothing_is_left_behind(evaluate: Evaluate, root: Path) -> None:
    directory = evaluate(PANEL, "store=false")
    assert not (root / "answers").exists()
    files = ["cells.json", "meta.json", "samples.jsonl", "timings.jsonl"]
    assert sorted(path.name for path in directory.iterdir()) == files


def test_a_dry_run_prints_and_writes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(config(root, PANEL, "dry_run=true"))
    output = capsys.readouterr().out
    assert "full" in output and "ksvd@0.5" in output and "time: about" in output
    assert not (root / "answers").exists() and not (root / "evaluate").exists()


def test_processes_give_the_files_of_one_process(
    evaluate: Evaluate, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = results(evaluate(PANEL, "out=alone"))
    shutil.rmtree(root / "answers")
    # Process 0 comes last, so that it finds what the others wrote.
    for rank in (2, 1, 0):
        for name, value in {"RANK": rank, "WORLD_SIZE": 3, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, str(value))
        run(config(root, PANEL, "out=several"))
        assert (root / "evaluate" / "several").exists() == (rank == 0)
    assert results(root / "evaluate" / "several") == alone


def test_a_process_that_died_ends_in_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="process 1 of 2 gave no answer"):
        run(config(root, PANEL, "patience=0.1"))
    assert not list((root / "evaluate").rglob("meta.json"))


def command(root: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "pipelines.evaluate", *SETTING, f"artifacts={root}", *overrides]


def test_kill_9_loses_nothing_that_was_stored(evaluate: Evaluate, root: Path) -> None:
    many = rows(16)
    write_prompts(root, many)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen(command(root, PANEL), cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
        while len(list((root / "answers").rglob("*.json"))) < 3:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    stored = {path: path.read_bytes() for path in (root / "answers").rglob("[!.]*.json")}
    assert 3 <= len(stored) < 32
    assert not list((root / "evaluate").rglob("meta.json"))

    resumed = results(evaluate(PANEL, "out=resumed"))
    assert {path: path.read_bytes() for path in stored} == stored  # seconds are in there: none was made again
    shutil.rmtree(root / "answers")
    assert results(evaluate(PANEL, "out=fresh")) == resumed


@pytest.mark.parametrize(
    ("mistake", "line"),
    [
        ("panel=[]", "the panel is empty: give at least one cell, e.g. panel='[{method: full}]'"),
        (
            "method.while_decoding={every: 0}",
            "every 0 in while_decoding of kqsvd is below 1: it is the number of tokens between two compressions",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(root: Path, mistake: str, line: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command(root, mistake), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"kvgauge: {line}"]


def test_a_method_that_does_not_serve_the_model_says_so_before_any_work(root: Path) -> None:
    with pytest.raises(UserError, match=r"^kvpress/dms knows no threshold by itself"):
        run(config(root, "method=kvpress/dms"))
    assert not list((root / "answers").rglob("*.json"))
    assert not list((root / "evaluate").glob("*"))


def test_missing_prompts_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`kvgauge prepare`"):
        run(config(tmp_path, "method=full"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda found: [], "no samples"),
        (lambda found: [found[0], found[0]], "twice"),
        (lambda found: [{key: value for key, value in found[0].items() if key != "question"}], "has no question"),
        (lambda found: [found[0] | {"context": "long " * 9000}], "8192 positions"),
    ],
)
def test_bad_samples_are_refused(
    root: Path, damage: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], message: str
) -> None:
    write_prompts(root, damage(rows(2)))
    with pytest.raises(UserError, match=message):
        run(config(root, "method=full"))
    assert not (root / "answers").exists()


def test_truncated_prompts_are_refused(root: Path) -> None:
    path = write_prompts(root, rows(2)) / "samples.jsonl"
    path.write_text(path.read_text()[:-30])
    with pytest.raises(UserError, match="damaged"):
        run(config(root, "method=full"))


def test_a_damaged_answer_is_made_again(evaluate: Evaluate, root: Path) -> None:
    directory = evaluate(PANEL)
    before = results(directory)
    path = sorted((root / "answers").rglob("*.json"))[0]
    path.write_text(json.dumps({"record": {"text": "forged"}, "checksum": "0"}))
    shutil.rmtree(directory)
    assert results(evaluate(PANEL)) == before


def test_sampled_answers_are_seeded_and_stand_apart(evaluate: Evaluate) -> None:
    panel = "panel=[{method: full},{method: ksvd, budget: 0.5}]"
    first = evaluate(panel, "temperature=1.5", "repeats=3")
    found = read_lines(first / "samples.jsonl")
    assert len(found) == 2 * 5 * 3
    assert {row["model"] for row in found} == {"tiny/llama, temperature 1.5"}
    of_one = [row["answer"] for row in found if row["cell"] == "full" and row["prompt"] == found[0]["prompt"]]
    assert len(set(of_one)) == 3
    assert all(row["n"] == 5 for row in read_json(first / "cells.json"))
    more = evaluate(panel, "temperature=1.5", "repeats=4", "batch_size=1")
    known = {(row["cell"], row["sample_id"]): row for row in read_lines(more / "samples.jsonl")}
    assert all(known[row["cell"], row["sample_id"]] == row for row in found)
    other = evaluate(panel, "temperature=1.5", "repeats=3", "seed=1")
    assert [row["answer"] for row in read_lines(other / "samples.jsonl")] != [row["answer"] for row in found]
    greedy = evaluate(panel)
    both = collect([first, greedy], [], [])
    assert {row["model"] for row in both.cells} == {"tiny/llama", "tiny/llama, temperature 1.5"}
    with pytest.raises(UserError, match="without a temperature"):
        evaluate(panel, "repeats=3")
