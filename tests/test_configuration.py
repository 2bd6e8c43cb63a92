"""Every YAML of conf/ composes and builds; params.yaml is the composed suite."""

from __future__ import annotations

import pytest
import yaml
from hydra import compose, initialize_config_dir

from kvgauge import configuration
from kvgauge.configuration import CONF_DIR, digest
from kvgauge.suite import PARAMS, PIPELINE, pipeline, write_params

BUILT = ("model", "method", "corpus", "benchmark", "latency")
ASKED = {("benchmark", "lm_eval"): ["benchmark.tasks=[gsm8k]"]}  # what only the user can say


@pytest.mark.parametrize("group", BUILT)
def test_every_choice_composes_and_builds(group):
    for name in configuration.names(group):
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            cfg = compose("config", overrides=[f"{group}={name}", *ASKED.get((group, name), [])])
        configuration.build(cfg[group], group)


@pytest.mark.parametrize("name", configuration.names("experiment"))
def test_every_experiment_composes(name):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("config", overrides=[f"experiment={name}"])
    for group in BUILT:
        configuration.build(cfg[group], group)


@pytest.mark.parametrize("name", ["local", "joblib", "slurm"])
def test_every_launcher_composes(name):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        compose("config", overrides=[f"launch={name}"], return_hydra_config=True)


def test_params_are_the_composed_suite_to_the_byte(tmp_path):
    write_params(tmp_path / PARAMS)
    committed = CONF_DIR.parent / PARAMS
    assert (tmp_path / PARAMS).read_bytes() == committed.read_bytes(), "run `make params`"


def test_stages_watch_the_code_that_they_reach():
    root = CONF_DIR.parent
    params = yaml.safe_load((root / PARAMS).read_text(encoding="utf-8"))
    assert pipeline(root / PIPELINE, params) == (root / PIPELINE).read_text(encoding="utf-8"), "run `make params`"


def test_the_digest_is_of_the_content_not_of_the_order():
    assert digest({"a": 1, "b": [2, {"c": 3}]}) == digest({"b": [2, {"c": 3}], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
