"""conf/wandb_sweep.yaml in the hands of W&B's own agent, without a network.

What the server does (it makes the grid and hands one combination after the other to the agent) is done here; from the
message on, everything is the agent's: it renders the command, sets the environment and starts the process.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

import kvgauge
from kvgauge import artifacts, provenance
from kvgauge.artifacts import read_json
from kvgauge.configuration import CONF_DIR
from kvgauge.stage import stage
from pipelines import evaluate, prepare

wandb = pytest.importorskip("wandb", reason="sweeps are W&B's")
agents = pytest.importorskip("wandb.wandb_agent")

ROOT = CONF_DIR.parent
SWEEP = yaml.safe_load((CONF_DIR / "wandb_sweep.yaml").read_text())
GRID = [
    dict(zip(SWEEP["parameters"], values, strict=True))
    for values in itertools.product(*(parameter["values"] for parameter in SWEEP["parameters"].values()))
]
# What a user would add to the parameters of the sweep to run it on a tiny model: constants.
TINY = {
    "model": "tiny/llama",
    "corpus": "file",
    "corpus.path": str(ROOT / "LICENSE"),  # a short text
    "corpus.sequence_length": 256,
    "corpus.num_sequences": 2,
    "benchmark.tasks": ["vt"],
    "benchmark.lengths": [2048],
    "benchmark.samples": 1,
}
OVERRIDES = [
    "model=tiny/llama",
    "corpus=file",
    f"corpus.path={ROOT / 'LICENSE'}",
    "corpus.sequence_length=256",
    "corpus.num_sequences=2",
    "benchmark.tasks=[vt]",
    "benchmark.lengths=[2048]",
    "benchmark.samples=1",
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt and the projections of the sweep's methods."""
    root = tmp_path_factory.mktemp("artifacts")
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("config", [*OVERRIDES, f"artifacts={root}"])
    prepare.run(cfg)
    model, tokenizer = kvgauge.load_model("tiny/llama")
    tokens = torch.randint(3, 259, (2, 128), generator=torch.Generator().manual_seed(0))
    moments = kvgauge.collect(model, [tokens])
    for name in SWEEP["parameters"]["method"]["values"]:
        method = kvgauge.build_method(name)
        fitted = method.fit(moments, model)
        assert fitted is not None
        directory = artifacts.begin(root / "fit" / name)
        fitted.save(directory / "projections.safetensors")
        artifacts.finish(directory, "fit", provenance.fit_config(cfg, model, tokenizer, method))
    return root


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """W&B's agent as its command sets it up, with no server to ask."""
    monkeypatch.chdir(ROOT)
    for name in ("WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "")  # the agent sets them for its children, in its own environment
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_PROJECT", "kvgauge")
    monkeypatch.setenv("WANDB_SWEEP_ID", "grid")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    wandb.teardown()  # W&B keeps the settings of its first run in a process
    yield agents.Agent(None, multiprocessing.Queue(), sweep_id="grid")
    wandb.teardown()


def start(
    agent: Any, command: list[str], combination: dict[str, Any], root: Path
) -> tuple[str, subprocess.Popen[bytes]]:
    """Hand a combination to the agent as the server words it: the run's id and the process."""
    run_id = "-".join(str(value) for value in combination.values())
    values = combination | TINY | {"artifacts": str(root)}
    agent._sweep_command = command
    message = {"type": "run", "run_id": run_id, "program": SWEEP["program"]}
    response = agent._process_command(message | {"args": {name: {"value": value} for name, value in values.items()}})
    assert "exception" not in response, response
    return run_id, agent._run_processes[run_id]._popen


def recorded(root: Path, run_id: str) -> dict[str, Any]:
    """An offline run read back with W&B's own command."""
    (run,) = (root / "wandb").glob(f"offline-run-*-{run_id}")
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", run]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, Any] = {"summary": {}}
    for line in map(json.loads, shown.splitlines()):
        if line["type"] == "run":
            found |= line["run"]
        elif line["type"] == "summary":
            found["summary"] |= line["summary"]["update"]
        elif line["type"] == "exit":
            found["exit_code"] = line["exit"]["exit_code"]
    return found


def check(root: Path, run_id: str, combination: dict[str, Any], directory: Path) -> None:
    """The offline run belongs to the sweep, has the combination, and the sweep's metric is the artifact's score."""
    run = recorded(root, run_id)
    assert (run["run_id"], run["sweep_id"], run["project"]) == (run_id, "grid", "kvgauge")
    config = run["config"]["update"]
    assert {name: config[name] for name in combination} == combination
    resolved = config["resolved"]["method"]
    assert (resolved["name"], resolved["budget"]) == (combination["method"], combination["method.budget"])
    assert config["fingerprint"] == read_json(directory / "meta.json")["fingerprint"]
    [overall] = [row for row in read_json(directory / "cells.json") if row["task"] == "all"]
    assert overall["cell"] == f"{combination['method']}@{combination['method.budget']:g}"
    assert run["summary"][SWEEP["metric"]["name"]] == overall["mean"]
    assert run["summary"]["all/bytes_ratio"] == overall["bytes_ratio"]
    assert run["exit_code"] == 0


def test_the_grid_is_that_of_the_file() -> None:
    assert len(GRID) == 9
    assert {(row["method"], row["method.budget"]) for row in GRID} >= {("kqsvd", 0.25), ("ksvd", 0.75)}


@pytest.mark.parametrize("combination", GRID, ids=lambda row: f"{row['method']}@{row['method.budget']}")
def test_the_agent_s_command_of_every_combination(
    combination: dict[str, Any],
    agent: Any,
    prepared: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # Behind `true` the agent starts a process that does nothing; what it would have been runs here, sparing an import
    # of torch per combination. The environment is the one that the agent made.
    run_id, process = start(agent, ["true", *SWEEP["command"]], combination, prepared)
    assert process.wait() == 0
    assert isinstance(process.args, list)
    words = [str(word) for word in process.args[1:]]
    assert words[:5] == ["/usr/bin/env", "python", "-m", "pipelines.evaluate", "tracker=wandb"]
    assert {f"{name}={value}" for name, value in combination.items()} <= set(words[5:])
    assert os.environ["WANDB_RUN_ID"] == run_id
    monkeypatch.setattr(sys, "argv", words[3:])
    stage(evaluate.run)()
    directory = Path(capfd.readouterr().out.splitlines()[-1])
    check(prepared, run_id, combination, directory)


def test_a_process_of_the_agent_s_own(agent: Any, prepared: Path, capfd: pytest.CaptureFixture[str]) -> None:
    combination = {"method": "kqsvd", "method.budget": 0.4}
    run_id, process = start(agent, list(SWEEP["command"]), combination, prepared)
    assert process.wait(timeout=300) == 0
    check(prepared, run_id, combination, Path(capfd.readouterr().out.splitlines()[-1]))


@pytest.mark.parametrize("command", [["sweep", "conf/wandb_sweep.yaml"], ["agent", "grid"]])
def test_without_a_server_there_is_no_sweep_and_no_message(command: list[str], agent: Any, tmp_path: Path) -> None:
    """What docs/running.md says cannot be done offline cannot."""
    home = {**os.environ, "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    done = subprocess.run(
        [Path(sys.executable).with_name("wandb"), *command], capture_output=True, text=True, env=home, check=False
    )
    assert done.returncode == 1
    assert "No API key configured" in done.stderr
