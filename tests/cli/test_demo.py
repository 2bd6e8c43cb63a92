"""`kvgauge demo`: every stage once, in one command."""

from __future__ import annotations

import sys

import pytest

from kvgauge.artifacts import read_json
from kvgauge.cli import main
from kvgauge.cli.commands import COMMANDS, is_stage
from kvgauge.cli.demo import STAGES

SMALL = [
    "model=tiny/llama",
    "benchmark.tasks=[niah_single_1]",
    "benchmark.lengths=[1024]",
    "benchmark.samples=2",
    "corpus.sequence_length=256",
    "corpus.num_sequences=2",
    "fidelity.context_length=160",
    "fidelity.continuation=32",
    "fidelity.ranks=[8]",
    "latency.context_lengths=[64]",
    "panel=[{method: full},{method: kqsvd, budget: 0.5}]",
]


def demo(monkeypatch, folder, *overrides):
    monkeypatch.setattr(sys, "argv", ["kvgauge", "demo", *overrides])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(folder)
    main.main()


def test_it_runs_every_stage():
    assert {name for name in COMMANDS if is_stage(name)} == set(STAGES)


def test_from_nothing_to_the_page(monkeypatch, tmp_path, capsys):
    demo(monkeypatch, tmp_path, *SMALL)
    page = tmp_path / "artifacts" / "report" / "suite" / "index.html"
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    assert "kqsvd" in page.read_text(encoding="utf-8")
    made = {path.parent.relative_to(tmp_path / "artifacts").parts[0] for path in tmp_path.rglob("meta.json")}
    assert made == {"prompts", "corpus", "collect", "fit", "merge", "evaluate", "latency", "report"}
    before = read_json(page.with_name("metrics.json"))

    demo(monkeypatch, tmp_path, *SMALL)
    assert capsys.readouterr().err.count("up to date: ") == 8
    assert read_json(page.with_name("metrics.json")) == before


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("panel=[{method: kqsvdd}]", "unknown method 'kqsvdd': did you mean 'kqsvd'"),
        ("panel=[{method: kqsvd, budget: 2}]", "budget 2 of kqsvd"),
        ("benchmark.smaples=2", "the configuration has no 'benchmark.smaples'"),
        ("batch_size=2.5", "batch_size is 2.5: it has to be a whole number"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
    ],
)
def test_a_mistake_ends_it_before_anything_is_made(monkeypatch, tmp_path, capfd, override, words):
    with pytest.raises(SystemExit) as caught:
        demo(monkeypatch, tmp_path, *SMALL, override)
    assert caught.value.code == 2
    assert words in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "artifacts").exists()
