"""The studies of a model on its calibration tokens: what they write, and that they run once."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir

from kvgauge.artifacts import META, read_json
from kvgauge.configuration import CONF_DIR
from kvgauge.errors import UserError
from pipelines import prepare
from pipelines.studies import alignment, asymmetry

TOKENS = (
    "model=tiny/llama",
    "corpus=file",
    f"corpus.path={CONF_DIR.parent / 'LICENSE'}",  # a short text
    "corpus.sequence_length=128",
    "corpus.num_sequences=2",
)
STUDIES = {
    "alignment": (alignment, "experiment=xkv_alignment", "alignment_rank=8"),
    "asymmetry": (asymmetry, "experiment=kvslimmer_asymmetry"),
}


def run(stage, artifacts, *overrides):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("config", overrides=[*overrides, *TOKENS, f"artifacts={artifacts}"])
    stage.run(cfg)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    root = tmp_path_factory.mktemp("studies")
    run(prepare, root, "benchmark.tasks=[vt]", "benchmark.lengths=[1024]", "benchmark.samples=1")
    return root


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_written_once(name, artifacts):
    study, *overrides = STUDIES[name]
    run(study, artifacts, *overrides)
    (directory,) = (artifacts / name).iterdir()
    meta = read_json(directory / META)
    assert meta["title"] and meta["caption"]
    assert (directory / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert read_json(directory / f"{name}.json")
    written = (directory / f"{name}.json").stat().st_mtime_ns
    run(study, artifacts, *overrides)
    assert (directory / f"{name}.json").stat().st_mtime_ns == written


def test_tokens_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="`kvgauge prepare`"):
        run(asymmetry, tmp_path)
