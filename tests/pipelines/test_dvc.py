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


def test_the_pipeline_parses_into_a_stage_per_method(clone):
    stages = {line.split()[0] for line in dvc(clone, "stage", "list", "--name-only").splitlines()}
    for stage in ("fit", "merge", "evaluate", "latency"):
        assert {f"{stage}@{method}" for method in ("ksvd", "eigen", "kqsvd")} <= stages
    assert {"prepare", "collect", "evaluate-full", "report"} <= stages


def test_every_source_dependency_exists():
    text = (ROOT / "dvc.yaml").read_text()
    for stage in yaml.safe_load(text)["stages"].values():
        methods = stage.get("matrix", {"method": [""]})["method"]
        for dependency in stage["deps"]:
            for method in methods:
                path = dependency.replace("${item.method}", method)
                assert path.startswith("artifacts/") or (ROOT / path).exists(), path


def test_a_method_s_stages_do_not_depend_on_another_method_s_source(clone):
    graph = dvc(clone, "dag", "--mermaid")
    assert "fit@ksvd" in graph
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for stage in ("fit", "merge", "evaluate", "latency"):
        assert "src/kvgauge/methods" not in stages[stage]["deps"]
        assert "src/kvgauge/methods/${item.method}.py" in stages[stage]["deps"]
