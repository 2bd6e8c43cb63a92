"""Methods whose settings decide whether they learn: no fit without need, the right one with it, and how to get it."""

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
    "corpus.sequence_length=128",
    "corpus.num_sequences=2",
    "store=false",
    "baseline=false",
)
AWARE = ("method=xkv", "method.whiten={keys:true,values:true}", "method.allocate=greedy", "method.sinks=4")


def run(stage, artifacts, *overrides):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("config", overrides=[*SETTINGS, f"artifacts={artifacts}", *overrides])
    importlib.import_module(f"pipelines.{stage}").run(cfg)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    root = tmp_path_factory.mktemp("fits")
    run("prepare", root)
    run("collect", root)
    return root


def test_the_plain_method_and_weighted_values_need_no_fit(artifacts, capsys):
    run("fit", artifacts, "method=xkv")
    assert "nothing to learn" in capsys.readouterr().err
    run("evaluate", artifacts, "method=xkv", "method.whiten={values:true}", "out=values")
    (row,) = read_lines(artifacts / "evaluate" / "values" / "samples.jsonl")
    assert row["nbytes"] <= 0.5 * row["full_nbytes"]


def test_weighted_keys_and_an_allocation_take_theirs(artifacts):
    with pytest.raises(UserError) as caught:
        run("evaluate", artifacts, *AWARE, "out=aware")
    command = str(caught.value)
    for setting in ("method=xkv", "'method.whiten={keys: true, values: true}'", "'method.allocate=greedy'"):
        assert setting in command
    run("fit", artifacts, *AWARE)
    run("evaluate", artifacts, *AWARE, "out=aware")
    (row,) = read_lines(artifacts / "evaluate" / "aware" / "samples.jsonl")
    assert row["nbytes"] <= 0.5 * row["full_nbytes"]
    with pytest.raises(UserError, match="no fit artifact"):  # an allocation is one of these groups
        run("evaluate", artifacts, *AWARE, "method.group_size=2", "out=other")
    run("evaluate", artifacts, *AWARE, "method.budget=0.3", "out=less")  # and serves every budget


def test_the_command_of_the_message_fits_what_is_missing(artifacts):
    overrides = ("method=kqsvd", "method.allocate=greedy")
    with pytest.raises(UserError) as caught:
        run("evaluate", artifacts, *overrides, "out=heads")
    told = str(caught.value).split("`")[1].split(" method=")[1]
    run("fit", artifacts, *(part.strip("'") for part in f"method={told}".split()))
    run("evaluate", artifacts, *overrides, "out=heads")
