"""Benchmarks from outside: the guide's example as a package of its own, from its prompts to the report."""

from __future__ import annotations

import csv
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import kvgauge
from kvgauge import configuration, fingerprint, provenance
from kvgauge.artifacts import read_json, read_lines
from kvgauge.configuration import CONF_DIR
from kvgauge.contract.benchmark import OTHER, as_benchmark, means_by_setting
from kvgauge.stage import stage

GUIDE = CONF_DIR.parent / "docs" / "adding-a-benchmark.md"
SETTINGS = {
    "prepare": [
        "model=tiny/llama",
        "corpus=file",
        f"corpus.path={CONF_DIR.parent / 'LICENSE'}",  # a short text
        "corpus.sequence_length=64",
        "corpus.num_sequences=2",
    ],
    "evaluate": ["model=tiny/llama"],
    "report": ["out=page"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The guide's example, importable, with its configuration beside it in the current directory."""
    path = tmp_path / "recital.py"
    path.write_text(blocks("python")[0])
    [node] = blocks("yaml")
    file = tmp_path / node.splitlines()[0].removeprefix("# ")
    file.parent.mkdir(parents=True)
    file.write_text(node)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(configuration, "_added", [])
    caches = (fingerprint.module_file, fingerprint.imports, fingerprint._content)
    for known in caches:
        known.cache_clear()
    yield path
    sys.modules.pop("recital", None)
    for known in caches:
        known.cache_clear()


def test_the_guide_s_example_passes_what_benchmarks_pass(example: Path) -> None:
    exec(compile(blocks("python")[1], str(GUIDE), "exec"), {})


def test_the_guide_s_commands_lead_to_a_report(
    example: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in re.findall(r"^python -m .*$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE):
        _, _, name, *overrides = shlex.split(line)
        monkeypatch.setattr(sys, "argv", [name, *overrides, *SETTINGS[name.removeprefix("pipelines.")]])
        stage(importlib.import_module(name).run)()
    [prompts], [evaluated] = (list(Path("artifacts", name).glob("*")) for name in ("prompts", "evaluate"))
    samples = [kvgauge.Sample.of(row) for row in read_lines(prompts / "samples.jsonl")]
    rows = read_lines(evaluated / "samples.jsonl")
    assert [row["cell"] for row in rows] == ["full"] * 8 + ["xkv@0.5"] * 8
    for row, sample in zip(rows, samples * 2, strict=True):
        wanted = SequenceMatcher(None, sample.answers[0], row["answer"].strip(), autojunk=False).ratio()
        assert (row["sample_id"], row["score"]) == (sample.id, wanted)
        assert row["kind"] == {"by_number": "retrieval", "by_line": "association"}[sample.task]
    assert any(row["score"] for row in rows)

    means = {cell["cell"]: cell["mean"] for cell in read_json(evaluated / "cells.json") if cell["task"] == "all"}
    averages = read_json(evaluated / "averages.json")
    assert {row["cell"]: row["mean"] for row in averages} == pytest.approx(means)
    assert {(row["benchmark"], row["average"], row["complete"]) for row in averages} == {("recital", "overall", True)}
    page = Path("artifacts", "report", "page")
    shown = {row["cell"]: row["overall"] for row in _table(page / "averages-recital.csv")}
    assert shown == {cell: f"{100 * mean:.2f}" for cell, mean in means.items()}
    assert [row["type"] for row in _table(page / "task_types.csv")] == ["retrieval"] * 2 + ["association"] * 2
    assert "recital" in (page / "index.html").read_text()
    capsys.readouterr()


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_its_code_is_the_version_of_its_prompts(example: Path) -> None:
    cfg = OmegaConf.create({"benchmark": {"_target_": "recital.Recital"}})
    before = provenance.benchmark_version(cfg)
    example.write_text(example.read_text() + "\n# another version\n")
    fingerprint._content.cache_clear()
    assert provenance.benchmark_version(cfg) != before
    with pytest.raises(kvgauge.UserError, match="Recital is no class of a module with a source"):
        provenance.benchmark_version(OmegaConf.create({"benchmark": {"_target_": "nowhere.at.all.Recital"}}))


@dataclass(frozen=True, kw_only=True)
class Plain(kvgauge.Benchmark):
    """Says only what it must."""

    name: str = "plain"

    def prompts(self, counter: Any) -> Iterator[kvgauge.Sample]:
        yield from ()

    def score(self, sample: kvgauge.Sample, answer: str) -> float:
        return 0.0


@dataclass(frozen=True, kw_only=True)
class Cutting(Plain):
    """Wants something that nobody does."""

    overlong: str = "shorten"  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class Unscored(kvgauge.Benchmark):
    """Has prompts and no score."""

    name: str = "unscored"

    def prompts(self, counter: Any) -> Iterator[kvgauge.Sample]:
        yield from ()


def test_what_a_benchmark_need_not_say() -> None:
    plain = as_benchmark(Plain())
    assert (plain.chat, plain.total, plain.overlong) == (True, None, "refuse")
    assert plain.kind("anything") == OTHER
    assert plain.averages([]) is None
    sample = kvgauge.Sample(id="a", task="t", context="c", question="q", answers=("a",), max_new_tokens=1, length=8)
    assert plain.turns([sample, sample], 2) == [sample, sample]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Cutting", "unknown way with overlong prompts of benchmark plain 'shorten'"),
        ("Unscored", "bad benchmark configuration: Can't instantiate abstract class Unscored"),
        ("Plian", "did you mean 'Plain'"),
    ],
)
def test_a_class_that_keeps_no_contract_is_refused(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks_of_a_user", sys.modules[__name__])
    with pytest.raises(kvgauge.UserError, match=message) as caught:
        as_benchmark(configuration.build({"_target_": f"benchmarks_of_a_user.{name}"}, "benchmark"))
    assert "\n" not in str(caught.value)


def test_a_method_is_no_benchmark() -> None:
    with pytest.raises(kvgauge.UserError, match=r"kvgauge\.methods\.exact\.full\.Full is no benchmark"):
        as_benchmark(configuration.build(configuration.read("method", "full"), "benchmark"))


def test_means_are_sorted_by_setting() -> None:
    setting = {"cell": "full", "method": "full", "budget": None, "compress_at": "context", "model": "m", "length": 8}
    cells = [setting | {"length": n, "task": task, "mean": m} for n, task, m in [(8, "a", 1), (4, "a", 0), (8, "b", 0)]]
    [long, short] = means_by_setting([*cells, setting | {"task": "all", "mean": 0.5}])
    assert long == (setting, {"a": 1.0, "b": 0.0})
    assert short == (setting | {"length": 4}, {"a": 0.0})
