"""dvc.yaml is consistent with the stages: every dependency exists, and every method has its own stages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kvgauge.configuration import CONF_DIR

ROOT = CONF_DIR.parent
DVC = Path(sys.executable).with_name("dvc")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The repository's DVC files in a place of their own, so that nothing of a running experiment is touched."""
    target = tmp_path_factory.mktemp("clone")
    for name in ("dvc.yaml", "params.yaml", ".dvcignore", "conf", "src", "pipelines"):
        (target / name).symlink_to(ROOT / name)
    (target / ".dvc").mkdir()
    (target / ".dvc" / "config").write_text("[core]\n    analytics = false\n    no_scm = true\n")
    return target


def dvc(where, *arguments):
    return subprocess.run([DVC, *arguments], cwd=where, capture_output=True, text=True, timeout=120, check=True).stdout


def test_the_pipeline_parses_into_one_stage_each(clone):
    stages = [line.split()[0] for line in dvc(clone, "stage", "list", "--name-only").splitlines()]
    assert sorted(stages) == sorted(["prepare", "collect", "fit", "merge", "evaluate", "latency", "report"])


def test_every_source_dependency_exists():
    for stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values():
        for path in stage["deps"]:
            assert path.startswith("artifacts/") or (ROOT / path).exists(), path


def test_stages_watch_the_methods_of_the_panel_and_no_other_family():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for stage in ("fit", "merge", "evaluate", "latency"):
        watched = stages[stage]["deps"]
        assert {"conf/panels/demo.yaml", "conf/method/xkv.yaml", "conf/quantizer/int8.yaml"} <= set(watched)
        assert "src/kvgauge/methods/merging/kvslimmer.py" in watched
        assert not any("kvquant" in path or "asymkv" in path or "src/kvgauge/report" in path for path in watched)
    assert not any("methods/merging" in path for path in stages["collect"]["deps"])
    # What persists and what is stored elsewhere lets a changed method run anew alone.
    assert stages["fit"]["outs"] == [{"artifacts/fit/suite": {"persist": True}}]
    assert not any("answers" in str(stage["outs"]) for stage in stages.values())
