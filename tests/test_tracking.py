"""W&B offline, read back with its own command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from kvgauge import artifacts
from kvgauge.configuration import CONF_DIR
from kvgauge.errors import UserError
from kvgauge.tracking import _mode, run_id, scalars, track

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


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user without any credentials."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_without_a_key_it_is_offline(home):
    assert _mode("auto") == "offline"


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("machine github.com login me password secret\n", "offline"),
        ("machine api.wandb.ai login user password " + "0" * 40 + "\n", "online"),
        ("machine api.wandb.ai\n", "offline"),
        ("default login me password secret\n", "online"),
        ("machine api.wandb.ai login\npassword", "offline"),
        ("this is no netrc", "offline"),
        ("", "offline"),
    ],
)
def test_a_file_of_passwords_counts_by_what_is_in_it(home, text, mode):
    (home / ".netrc").write_text(text)
    (home / ".netrc").chmod(0o600)
    assert _mode("auto") == mode


def test_a_server_of_one_s_own_has_its_own_entry(home, monkeypatch):
    (home / "passwords").write_text("machine wandb.example.org login user password " + "0" * 40 + "\n")
    monkeypatch.setenv("NETRC", str(home / "passwords"))
    assert _mode("auto") == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert _mode("auto") == "online"


@pytest.mark.parametrize("said", ["online", "offline", "disabled"])
def test_the_environment_says_how_and_the_configuration_has_the_last_word(home, monkeypatch, said):
    monkeypatch.setenv("WANDB_MODE", said)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert _mode("auto") == said
    assert [_mode(mode) for mode in ("online", "offline", "disabled")] == ["online", "offline", "disabled"]


def test_a_netrc_without_an_entry_logs_offline(artifact, home):
    (home / ".netrc").write_text("machine github.com login me password secret\n")
    track(configuration("tracker=wandb", f"artifacts={artifact.parents[1]}"), artifact)
    assert len(list((artifact.parents[1] / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.parametrize("how", ["environment", "configuration"])
def test_disabled_writes_nothing(artifact, home, monkeypatch, how):
    overrides = ["tracker=wandb", f"artifacts={artifact.parents[1]}"]
    if how == "environment":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    else:
        overrides.append("tracker.mode=disabled")
    before = sorted(artifact.parents[1].rglob("*"))
    track(configuration(*overrides), artifact)
    assert sorted(artifact.parents[1].rglob("*")) == before


def test_a_refused_login_is_one_line_and_keeps_the_artifact(artifact, home, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "too-short")
    with pytest.raises(UserError, match=r"tracker=wandb: .*is finished; log it with tracker\.mode=offline"):
        track(configuration("tracker=wandb", "tracker.mode=online", f"artifacts={artifact.parents[1]}"), artifact)
    assert (artifact / "meta.json").is_file()


def test_an_unknown_word_in_the_environment(home, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disable")
    with pytest.raises(UserError, match="unknown WANDB_MODE 'disable': did you mean 'disabled'"):
        _mode("auto")


def test_unknown_trackers_and_modes(artifact):
    with pytest.raises(UserError, match="unknown tracker 'mlflow'"):
        track(configuration("tracker.name=mlflow"), artifact)
    with pytest.raises(UserError, match="unknown tracker mode 'onlin': did you mean 'online'"):
        track(configuration("tracker=wandb", "tracker.mode=onlin"), artifact)
