"""W&B offline, read back with its own command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from kvgauge import artifacts
from kvgauge.configuration import CONF_DIR
from kvgauge.errors import UserError
from kvgauge.tracking import run_id, scalars, track

CELLS = [
    {"cell": "ksvd@0.5", "task": "vt", "mean": 0.5, "low": 0.2, "high": 0.8, "bytes_ratio": 0.5, "diff": None},
    {"cell": "ksvd@0.5", "task": "all", "mean": 0.25, "low": 0.1, "high": 0.4, "bytes_ratio": 0.5, "diff": -0.1},
]


def configuration(*overrides):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("config", overrides=list(overrides))


@pytest.fixture
def artifact(tmp_path):
    directory = artifacts.begin(tmp_path / "evaluate" / "ksvd")
    artifacts.write_json(directory / "cells.json", CELLS)
    artifacts.finish(directory, "evaluate", {"x": 1})
    return directory


def test_one_cell_logs_scores_by_task(artifact):
    found = scalars(artifact)
    assert found["all/score"] == 0.25
    assert found["vt/score_high"] == 0.8
    assert "vt/diff" not in found


def test_a_panel_puts_the_cell_in_front(artifact):
    artifacts.write_json(artifact / "cells.json", [*CELLS, CELLS[0] | {"cell": "full"}])
    assert scalars(artifact)["full/vt/score"] == 0.5


def test_an_offline_run_holds_configuration_metrics_and_table(artifact, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    cfg = configuration("tracker=wandb", "tracker.mode=offline", f"artifacts={artifact.parents[1]}", "method=ksvd")
    track(cfg, artifact)
    (run,) = (artifact.parents[1] / "wandb").glob("offline-run-*")
    meta = artifacts.read_json(artifact / "meta.json")
    assert run_id(meta) in run.name
    wandb = Path(sys.executable).with_name("wandb")
    shown = subprocess.run([wandb, "leet", "inspect", "--json", run], capture_output=True, text=True, check=True).stdout
    assert '"all/score"' in shown
    assert meta["fingerprint"] in shown
    assert "config_hash" in shown
    assert '"resolved"' not in shown  # only where a sweep overwrites keys of the configuration
    (table,) = run.glob("files/media/table/*.json")
    assert "ksvd@0.5" in json.dumps(json.loads(table.read_text())["data"])


def test_off_is_the_default_and_leaves_nothing(artifact):
    track(configuration(f"artifacts={artifact.parents[1]}"), artifact)
    assert not (artifact.parents[1] / "wandb").exists()


def test_unknown_trackers_and_modes(artifact):
    with pytest.raises(UserError, match="unknown tracker 'mlflow'"):
        track(configuration("tracker.name=mlflow"), artifact)
    with pytest.raises(UserError, match="unknown tracker mode 'onlin': did you mean 'online'"):
        track(configuration("tracker=wandb", "tracker.mode=onlin"), artifact)
