"""The fields of conf/config.yaml that belong to no group."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from kvgauge.configuration import CONF_DIR, read
from kvgauge.errors import UserError
from kvgauge.run_config import GROUPS, PARTS, RunConfig, artifact_name, check


def configured(*overrides):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def test_every_field_of_the_configuration_has_a_type():
    own = yaml.safe_load((CONF_DIR / "config.yaml").read_text(encoding="utf-8"))
    known = {field.name for field in dataclasses.fields(RunConfig)}
    assert set(own) - {"defaults", "hydra"} == known | {"report"}
    assert {*PARTS, *GROUPS} - {"report"} <= {
        name for entry in own["defaults"] if isinstance(entry, dict) for name in entry
    }
    for name, cls in PARTS.items():
        node = own.get(name) or read(name, "wandb" if name == "tracker" else "default")
        assert set(node) == {field.name for field in dataclasses.fields(cls)}, name


def test_the_default_and_every_experiment_pass():
    check(configured())
    check(configured("tracker=wandb"))
    for path in (CONF_DIR / "experiment").glob("*.yaml"):
        check(configured(f"experiment={path.stem}"))


def test_the_suite_s_parameters_pass():
    check(OmegaConf.load(CONF_DIR.parent / "params.yaml"))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("budgets=0.5", "budgets is 0.5: it has to be a list of numbers or null, e.g. budgets=[0.5]"),
        ("budgets=[half]", 'budgets[0] is "half": it has to be a number'),
        ("batch_size=2.5", "batch_size is 2.5: it has to be a whole number"),
        ("turns=two", 'turns is "two": it has to be a whole number'),
        ("seed=null", "seed is null: it has to be a whole number"),
        ("store=1", "store is 1: it has to be true or false"),
        ("patience=long", 'patience is "long": it has to be a number'),
        ("panel=5", "panel is 5: it has to be a name or a list of cells {method: name, field: value} or null"),
        ("panel=[full]", 'panel[0] is "full": it has to be a cell {method: name, field: value}'),
        ("compress_at=Context", "unknown compress_at 'Context': did you mean 'context'? choose one of context, prompt"),
        ("artifacts=3", "artifacts is 3: it has to be a directory"),
        (
            "report.evaluate=html",
            'report.evaluate is "html": it has to be a list of directories or null, e.g. report.evaluate=[html]',
        ),
        ("report.figures=null", "report.figures is null: it has to be a list of names"),
        ("fidelity.ranks=8", "fidelity.ranks is 8: it has to be a list of whole numbers, e.g. fidelity.ranks=[8]"),
        (
            "benchmark.lengths=[4096.0]",
            "benchmark.lengths[0] is 4096.0: it has to be a whole number, e.g. benchmark.lengths[0]=4096",
        ),
        ("corpus.num_sequences=2.5", "corpus.num_sequences is 2.5: it has to be a whole number"),
        ("latency.peak=often", 'latency.peak is "often": it has to be true or false'),
        ("+model.seed=x", 'model.seed is "x": it has to be a whole number'),
        ("+method.rnak=3", "unknown field of method kqsvd 'rnak': did you mean 'rank'?"),
    ],
)
def test_a_wrong_value_is_named_with_the_right_kind(override, line):
    with pytest.raises(UserError) as caught:
        check(configured(override))
    assert str(caught.value).startswith(line)


def test_a_group_is_no_plain_value():
    cfg = configured()
    cfg.latency = None
    with pytest.raises(UserError, match=r"^latency is None: choose one with latency="):
        check(cfg)


def test_what_is_added_or_missing_is_no_matter_of_the_check():
    cfg = configured("+mine=3")
    OmegaConf.set_struct(cfg, False)
    del cfg["budgets"], cfg["fidelity"], cfg["benchmark"]
    check(cfg)


@pytest.mark.parametrize("out", ["suite", "kqsvd@0.5", "a.b", "..hidden", 2026, "ü"])
def test_a_name_for_a_directory(out):
    assert artifact_name(out) == str(out)


def test_no_name():
    assert artifact_name(None) is artifact_name("") is None


@pytest.mark.parametrize(
    "out", ["../../elsewhere", "/tmp/x", "a/b", "a/", "./a", ".", "..", "~/x", "a\\b", "a/../b", "x\0y", "x\ny"]
)
def test_a_path_is_no_name(out):
    with pytest.raises(UserError, match=r"it is the name of a directory.*artifacts= is the place"):
        artifact_name(out)
