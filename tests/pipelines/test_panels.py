"""fit and merge over a panel: one process, one artifact per fit, and nothing made again that is there."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from kvgauge import fingerprint
from kvgauge.artifacts import META, read_json
from kvgauge.configuration import CONF_DIR
from pipelines import collect, fit, merge, prepare

PANEL = (
    "panel=[{method: full},{method: ksvd, budget: 0.75},{method: ksvd, budget: 0.5},{method: kqsvd, budget: 0.5},"
    "{method: compose, compose: [kqsvd, int4], budget: 0.25},{method: kvslimmer, window: 16, start: 2, budget: 0.5}]"
)
OPTIONS = (
    "model=tiny/llama",
    "benchmark.tasks=[vt]",
    "benchmark.lengths=[3000]",
    "benchmark.samples=1",
    "corpus=file",
    f"corpus.path={CONF_DIR.parent / 'LICENSE'}",  # a short text
    "corpus.sequence_length=96",
    "corpus.num_sequences=2",
    "fidelity.context_length=64",
    "fidelity.continuation=8",
    "fidelity.contexts=1",
    "fidelity.ranks=[8]",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("panel")
    for stage in (prepare, collect):
        stage.run(config(root))
    return root


def config(root: Path, *more: str):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("config", overrides=[*OPTIONS, f"artifacts={root}", PANEL, *more])


def fits(root: Path) -> dict[str, float]:
    """When every fit was finished, by the name of its method."""
    found = (root / "fit").rglob(META)
    return {str(read_json(path)["config"]["fit"]["method"]): path.stat().st_mtime_ns for path in found}


def test_every_fit_is_made_once_and_a_changed_method_alone_again(root, monkeypatch, capsys):
    fit.run(config(root, "out=suite"))
    first = fits(root)
    assert set(first) == {"KSVD", "KQSVD"}  # two budgets share one, and so does the composition
    assert {path.parts[-3] for path in (root / "fit").rglob(META)} == {"suite"}
    fit.run(config(root, "out=suite"))
    assert fits(root) == first
    read, changed = fingerprint._content, fingerprint.module_file("kvgauge.methods.per_head.ksvd")
    monkeypatch.setattr(fingerprint, "_content", lambda path: read(path) + (b"#" if path == changed else b""))
    fit.run(config(root, "out=suite"))
    ends = [path.parent.name for path in (root / "fit").rglob(META)]
    assert sum(name.startswith("ksvd") for name in ends) == 2 and sum(name.startswith("kqsvd") for name in ends) == 1
    assert fits(root)["KQSVD"] == first["KQSVD"]


def test_one_table_of_fidelity(root):
    fit.run(config(root))
    merge.run(config(root, "out=suite"))
    cells = [row["cell"] for row in read_json(root / "merge" / "suite" / "model.json")]
    assert cells == ["full", "ksvd@0.75", "ksvd@0.5", "kqsvd@0.5", "compose@0.25", "kvslimmer@0.5"]
    rows = read_json(root / "merge" / "suite" / "fidelity.json")
    projected = [(row["method"], row["rank_k"]) for row in rows if row["budget"] is None and "cell" not in row]
    assert set(projected) == {("ksvd", 8), ("kqsvd", 8)}
    assert len(projected) == 2 * 4 * 7  # layers and quantities, once for each method however many cells it has


def test_nothing_to_learn_says_so(root, capsys):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        fit.run(compose("config", overrides=[*OPTIONS, f"artifacts={root}", "panel=[{method: full}]"]))
    assert "full: nothing to learn" in capsys.readouterr().err
