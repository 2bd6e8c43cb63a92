"""All stages, one after the other, on a tiny model; what a second run does; what a mistake says."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir

from kvgauge.artifacts import read_json, read_lines
from kvgauge.compare import main as compare
from kvgauge.configuration import CONF_DIR
from kvgauge.errors import UserError
from kvgauge.stage import stage as as_command

SETTINGS = (
    "model=tiny/llama",
    "benchmark.tasks=[niah_single_1,vt]",
    "benchmark.lengths=[2048]",
    "benchmark.samples=2",
    "corpus.sequence_length=256",
    "corpus.num_sequences=2",
    "fidelity.contexts=1",
    "fidelity.context_length=160",
    "fidelity.continuation=32",
    "fidelity.ranks=[8,4]",
    "latency.context_lengths=[64]",
    "latency.batch_sizes=[1]",
    "budgets=[0.75,0.5]",
)


def run(stage, artifacts, *overrides):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("config", overrides=[*SETTINGS, f"artifacts={artifacts}", *overrides])
    importlib.import_module(f"pipelines.{stage}").run(cfg)


def command(stage, monkeypatch, *overrides):
    """The exit code of a stage's command."""
    module = importlib.import_module(f"pipelines.{stage}")
    monkeypatch.setattr(sys, "argv", [f"pipelines.{stage}", *overrides])
    with pytest.raises(SystemExit) as caught:
        as_command(module.run)()
    return caught.value.code


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """A finished pipeline of three methods."""
    root = tmp_path_factory.mktemp("pipeline")
    run("prepare", root)
    run("collect", root)
    for method in ("ksvd", "eigen", "kqsvd"):
        for stage in ("fit", "merge", "evaluate"):
            run(stage, root, f"method={method}", f"out={method}")
    run("evaluate", root, "method=full", "budgets=null", "out=full")
    run("latency", root, "method=kqsvd")
    run("report", root, "out=page")
    return root


def only(root, pattern):
    (found,) = root.glob(pattern)
    return found


def test_every_stage_leaves_a_finished_artifact(artifacts):
    counts = {stage: len(list((artifacts / stage).glob("*/meta.json"))) for stage in ("prompts", "corpus", "collect")}
    assert counts == {"prompts": 1, "corpus": 2, "collect": 1}
    for stage in ("fit", "merge"):
        assert len(list((artifacts / stage).glob("*/meta.json"))) == 3
    assert len(list((artifacts / "evaluate").glob("*/meta.json"))) == 4
    page = (artifacts / "report" / "page" / "index.html").read_text()
    assert "kqsvd" in page and "data:image/png;base64," in page


def test_the_seven_errors_and_the_model_s(artifacts):
    rows = read_json(artifacts / "merge" / "kqsvd" / "fidelity.json")
    assert {row["quantity"] for row in rows} == {"K", "Q", "V", "KQ", "VO", "softmax", "output"}
    by_rank = {
        rank: sum(
            row["error"] for row in rows if row["rank_k"] == rank and row["quantity"] == "KQ" and row["budget"] is None
        )
        for rank in (8, 4)
    }
    assert 0 < by_rank[8] < by_rank[4]
    for row in read_json(artifacts / "merge" / "kqsvd" / "model.json"):
        assert row["kl"] > 0 and row["nbytes"] <= row["budget"] * row["full_nbytes"]


def test_samples_say_that_compression_happened(artifacts):
    rows = read_lines(artifacts / "evaluate" / "kqsvd" / "samples.jsonl")
    assert len(rows) == 2 * 4  # budgets × samples
    for row in rows:
        assert row["compressed_tokens"] == row["context_tokens"]
        assert row["nbytes"] <= row["budget"] * row["full_nbytes"]


def test_a_finished_stage_does_nothing_again(artifacts, capsys):
    path = artifacts / "fit" / "kqsvd" / "projections.safetensors"
    before = path.stat().st_mtime_ns
    run("fit", artifacts, "method=kqsvd", "out=kqsvd")
    assert path.stat().st_mtime_ns == before
    assert "up to date" in capsys.readouterr().err


def test_a_sweep_makes_the_same_numbers_in_another_place(artifacts, tmp_path):
    for stage in ("prompts", "corpus", "collect", "fit"):
        (tmp_path / stage).symlink_to(artifacts / stage)
    run("evaluate", tmp_path, "method=ksvd", "method.budget=0.5", "budgets=null")
    alone = [row for row in read_lines(only(tmp_path, "evaluate/*/samples.jsonl")) if row["budget"] == 0.5]
    together = read_lines(artifacts / "evaluate" / "ksvd" / "samples.jsonl")
    assert json.dumps(alone) == json.dumps([row for row in together if row["budget"] == 0.5])


def test_results_stand_side_by_side(artifacts, capsys):
    compare([str(artifacts), str(artifacts / "evaluate" / "ksvd"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {row["cell"] for row in found["compared"]} == {"ksvd@0.75", "ksvd@0.5"}
    others = {f"{method}@{budget}" for method in ("eigen", "kqsvd") for budget in (0.75, 0.5)}
    assert {row["cell"] for row in found["lost"]} == {"full", *others}
    assert all(row["diff"] == 0 and row["n"] == 4 and row["changed"] == [] for row in found["compared"])
    assert found["gained"] == found["unpaired"] == []


@pytest.mark.parametrize(
    ("stage", "overrides", "words"),
    [
        ("fit", ["method=kqsvdd"], "unknown method 'kqsvdd': did you mean 'kqsvd'"),
        ("fit", ["model=smolm2-135m"], "unknown model 'smolm2-135m': did you mean 'smollm2-135m'"),
        ("prepare", ["corpus=essay"], "unknown corpus 'essay': did you mean 'essays'"),
        ("evaluate", ["benchmark=rulr"], "unknown benchmark 'rulr': did you mean 'ruler'"),
        ("prepare", ["model=tiny/llama", "benchmark._target_=nobody.has.This"], "there is no module 'nobody'"),
        ("evaluate", ["method.budget=1.5"], "budget 1.5 of kqsvd is outside (0, 1]"),
        ("evaluate", ["nonsense=1"], "the configuration has no 'nonsense'"),
        ("prepare", ["model=tiny/llama", "benchmark.tasks=[niah_singel_1]"], "did you mean 'niah_single_1'"),
        ("evaluate", ["budgets=0.5"], "budgets is 0.5: it has to be a list of numbers or null, e.g. budgets=[0.5]"),
        ("evaluate", ["benchmark.lengths=[4096.0]"], "benchmark.lengths[0] is 4096.0: it has to be a whole number"),
        ("collect", ["out=../../elsewhere"], "out is '../../elsewhere': it is the name of a directory"),
        ("report", ["report.figures=[aligment]"], "'aligment': did you mean 'alignment'?"),
        ("report", ["report.evaluate=html"], 'report.evaluate is "html": it has to be a list of directories'),
        ("fit", ["compress_at=Prompt"], "unknown compress_at 'Prompt': did you mean 'prompt'?"),
        ("fit", ["model=[1]"], "bad configuration"),
        ("merge", ["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line_and_exit_code_2(
    stage, overrides, words, tmp_path, monkeypatch, capfd
):
    assert command(stage, monkeypatch, *overrides, f"artifacts={tmp_path / 'a'}") == 2
    message = capfd.readouterr().err.strip()
    assert words in message
    assert len(message.splitlines()) == 1
    assert not list(tmp_path.glob("a/*/*/meta.json"))


def test_a_real_command_ends_with_code_2_and_no_traceback(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "pipelines.fit", "method=kqsvd", "method.budget=2", f"artifacts={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=CONF_DIR.parent,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.strip() == "kvgauge: budget 2 of kqsvd is outside (0, 1]: give the share of bytes to keep"


@pytest.mark.parametrize(
    ("stage", "overrides", "words"),
    [
        ("collect", [], "no corpus artifact.*`kvgauge prepare`"),
        ("fit", [], "no collect artifact.*`kvgauge collect`"),
        ("evaluate", [], "`kvgauge prepare`"),
        ("report", [], "nothing to report"),
        ("prepare", ["corpus.num_sequences=100000"], "tokens"),
    ],
)
def test_missing_inputs_name_the_stage_to_run(stage, overrides, words, tmp_path):
    with pytest.raises(UserError, match=words):
        run(stage, tmp_path, *overrides)


def test_a_directory_holds_what_its_last_run_wrote(artifacts, tmp_path):
    for stage in ("prompts", "corpus", "collect", "fit"):
        (tmp_path / stage).symlink_to(artifacts / stage)
    run("evaluate", tmp_path, "method=full", "budgets=null", "out=one")
    directory = tmp_path / "evaluate" / "one"
    (directory / "notes.txt").write_text("mine")
    own = {"samples.jsonl", "timings.jsonl", "cells.json", "meta.json"}
    meta = read_json(directory / "meta.json")
    (directory / "averages.json").write_text("[]")  # as another benchmark's run leaves it
    (directory / "meta.json").write_text(json.dumps(meta | {"files": [*meta["files"], "averages.json"]}))
    run("evaluate", tmp_path, "method=ksvd", "budgets=[0.5]", "out=one")
    assert {path.name for path in directory.iterdir()} == own | {"notes.txt"}


def test_lengths_beyond_the_positions(artifacts, tmp_path):
    (tmp_path / "corpus").symlink_to(artifacts / "corpus")
    (tmp_path / "collect").symlink_to(artifacts / "collect")
    (tmp_path / "fit").symlink_to(artifacts / "fit")
    with pytest.raises(UserError, match="longer than the model's 8192 positions"):
        run("merge", tmp_path, "fidelity.context_length=9000")
    run("prepare", tmp_path, "benchmark.lengths=[9000]", "benchmark.tasks=[niah_single_1]", "benchmark.samples=1")
    with pytest.raises(UserError, match="8192 positions"):
        run("evaluate", tmp_path, "benchmark.lengths=[9000]", "benchmark.tasks=[niah_single_1]", "benchmark.samples=1")


def test_a_truncated_artifact_is_named(artifacts, tmp_path):
    source = only(artifacts, "collect/*")
    target = tmp_path / "collect" / "torn"
    target.mkdir(parents=True)
    (target / "meta.json").write_bytes((source / "meta.json").read_bytes())
    whole = (source / "moments.safetensors").read_bytes()
    (target / "moments.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"moments\.safetensors is damaged"):
        run("fit", tmp_path)
    assert not (tmp_path / "fit").exists()
