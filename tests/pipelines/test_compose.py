"""A composition through the stages: the fit of its projector is found, alone and as a cell of a panel."""

from __future__ import annotations

import importlib

import pytest
from hydra import compose, initialize_config_dir

from kvgauge.artifacts import read_lines
from kvgauge.configuration import CONF_DIR
from kvgauge.errors import UserError

SETTINGS = (
    "model=tiny/llama",
    "benchmark.tasks=[vt]",
    "benchmark.lengths=[2048]",
    "benchmark.samples=1",
    "corpus=file",
    f"corpus.path={CONF_DIR.parent / 'LICENSE'}",  # a short text
    "corpus.sequence_length=256",
    "corpus.num_sequences=2",
)
CELL = "{method: compose, compose: [kqsvd, int4], name: kqsvd-int4, budget: 0.25}"


def run(stage, artifacts, *overrides):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("config", overrides=[*SETTINGS, f"artifacts={artifacts}", *overrides])
    importlib.import_module(f"pipelines.{stage}").run(cfg)


def rows_of(directory):
    (path,) = directory.glob("**/samples.jsonl")
    return read_lines(path)


def test_the_fit_of_the_projector_is_found(tmp_path):
    run("prepare", tmp_path)
    run("collect", tmp_path)
    with pytest.raises(UserError, match=r"kvgauge fit method=kqsvd"):
        run("evaluate", tmp_path, "method=compose", "method.compose=[kqsvd,int4]", "out=early")
    run("fit", tmp_path, "method=kqsvd")
    run("evaluate", tmp_path, "method=compose", "method.compose=[kqsvd,int4]", "method.budget=0.25", "out=alone")
    run("evaluate", tmp_path, f"panel=[{{method: full}},{CELL},{{method: kqsvd, budget: 0.25}}]", "out=panel")
    (alone,) = rows_of(tmp_path / "evaluate" / "alone")
    full, composed, plain = rows_of(tmp_path / "evaluate" / "panel")
    assert composed["cell"] == "kqsvd-int4@0.25" and alone["cell"] == "compose@0.25"
    assert composed["answer"] == alone["answer"] and composed["nbytes"] == alone["nbytes"]
    assert composed["full_nbytes"] == full["full_nbytes"] // 2  # 16 bits a number; the model has 32
    assert composed["nbytes"] <= 0.25 * composed["full_nbytes"] < plain["nbytes"]
