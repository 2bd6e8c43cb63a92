"""Methods from outside: the guide's example as a package of its own, by path, directory and entry point."""

from __future__ import annotations

import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import kvgauge
from kvgauge import configuration, fingerprint
from kvgauge.configuration import CONF_DIR
from kvgauge.contract.identity import method_version
from kvgauge.contract.method import Method
from kvgauge.evaluation.panel import settings
from kvgauge.evaluation.run import evaluate
from kvgauge.methods import registry
from kvgauge.testing import check_method
from pipelines import prepare

DOCS = CONF_DIR.parent / "docs"


def blocks(guide: str) -> list[str]:
    """A guide's Python: the method, and what its reader runs."""
    return re.findall(r"```python\n(.*?)```", (DOCS / guide).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def importable(tmp_path, monkeypatch):
    """Makes a guide's method a module of its own."""
    written = []

    def write(guide: str) -> Path:
        source = blocks(guide)[0]
        path = tmp_path / source.splitlines()[0].removeprefix("# ")
        path.write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        fingerprint.module_file.cache_clear()
        written.append(path.stem)
        return path

    yield write
    for name in written:
        sys.modules.pop(name, None)
    for known in (fingerprint.module_file, fingerprint.imports):
        known.cache_clear()


@pytest.fixture
def example(importable):
    return importable("adding-a-method.md")


@pytest.mark.parametrize(
    ("guide", "path", "too_small", "least"),
    [
        ("adding-a-method.md", "half_cache.HalfCache", 0.4, "0.5 that it reaches"),
        ("tutorial.md", "front_bits.FrontBits", 0.3, "0.3.* that it reaches"),
    ],
)
def test_a_guide_s_example_passes_what_methods_pass(importable, guide, path, too_small, least):
    importable(guide)
    exec(compile(blocks(guide)[1], guide, "exec"), {})
    method = kvgauge.build_method(path, budget=too_small)
    with pytest.raises(kvgauge.UserError, match=rf"budget {too_small} of {method.name} is below the {least}"):
        check_method(method, kvgauge.load_model("tiny/llama")[0])


def test_it_runs_in_a_panel_and_its_code_is_its_version(example, tmp_path):
    options = [
        "model=tiny/llama",
        "benchmark.tasks=[vt]",
        "benchmark.lengths=[3000]",
        "benchmark.samples=1",
        "corpus=file",
        f"corpus.path={CONF_DIR.parent / 'LICENSE'}",  # a short text
        "corpus.sequence_length=64",
        "corpus.num_sequences=2",
        f"artifacts={tmp_path / 'artifacts'}",
        "panel=[{method: half_cache.HalfCache, budget: 0.5}]",
    ]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("config", overrides=options)
    prepare.run(cfg)
    directory = evaluate(cfg)
    assert directory is not None
    [cell] = {row["cell"] for row in configuration.plain(_rows(directory / "samples.jsonl"))}
    assert cell == "half_cache@0.5"
    method = kvgauge.build_method("half_cache.HalfCache")
    before = method_version(method)
    example.write_text(example.read_text() + "\n# another version\n")
    fingerprint._content.cache_clear()
    assert method_version(method) != before


def _rows(path: Path):
    from kvgauge.artifacts import read_lines

    return read_lines(path)


def test_a_directory_of_configurations(example, tmp_path, monkeypatch):
    folder = tmp_path / "conf" / "method"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("_target_: half_cache.HalfCache\nname: mine\nbudget: 0.5\n")
    monkeypatch.setattr(configuration, "_added", [])
    configuration.add_directory(tmp_path / "conf")
    assert kvgauge.build_method("mine").label == "mine@0.5"
    assert "mine" in kvgauge.list_methods()
    (folder / "xkv.yaml").write_text("_target_: half_cache.HalfCache\n")
    with pytest.raises(kvgauge.UserError, match=r"two files are the method 'xkv'.*rename the second"):
        kvgauge.build_method("xkv")


class Package:
    def __init__(self, name: str) -> None:
        self.name = name


def point(name: str, value: str, package: str) -> EntryPoint:
    made = EntryPoint(name, value, registry.GROUP)
    vars(made)["dist"] = Package(package)
    return made


@pytest.fixture
def installed(monkeypatch):
    """Entry points as if packages had been installed."""

    def install(*points: EntryPoint) -> None:
        monkeypatch.setattr(registry, "entry_points", lambda group: points)
        registry.registered.cache_clear()

    yield install
    registry.registered.cache_clear()


def test_an_entry_point(example, installed):
    installed(point("halved", "half_cache:HalfCache", "half-cache"))
    assert kvgauge.build_method("halved", budget=0.5).label == "half_cache@0.5"
    assert "halved" in kvgauge.list_methods()


@pytest.mark.parametrize(
    ("name", "packages", "message"),
    [
        ("halved", ["one", "two"], "two methods are called 'halved': that of one stands, and two loses"),
        ("xkv", ["three"], "two methods are called 'xkv': that of kvgauge stands, and three loses"),
    ],
)
def test_two_methods_of_one_name(name, packages, message, example, installed):
    installed(*(point(name, "half_cache:HalfCache", package) for package in packages))
    with pytest.raises(kvgauge.UserError, match=message) as refusal:
        kvgauge.build_method(name)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("half_cache.HalfLayer", "is no dataclass"),
        ("half_cache.HalfCash", "unknown class in half_cache 'HalfCash': did you mean 'HalfCache'"),
        ("half_cash.HalfCache", "there is no module 'half_cash': install its package or correct the path"),
        ("kvgauge.corpora.corpus.CorpusConfig", "CorpusConfig is no method: it has to be a subclass of kvgauge.Method"),
        ("broken_package.Mine", r"importing broken_package failed \(RuntimeError: out of order\)"),
        ("kqsdv", "unknown method 'kqsdv': did you mean 'kqsvd'"),
    ],
)
def test_what_is_no_method_is_one_line(name, message, example):
    (example.parent / "broken_package.py").write_text("raise RuntimeError('out of order\\nat line 2')")
    with pytest.raises(kvgauge.UserError, match=message) as refusal:
        kvgauge.build_method(name)
    assert "\n" not in str(refusal.value)


def test_an_entry_point_that_fails_to_import(example, installed):
    installed(point("lost", "no_such_package.module:Mine", "lost-and-found"))
    with pytest.raises(kvgauge.UserError, match="there is no module 'no_such_package'"):
        kvgauge.build_method("lost")


def test_a_method_as_it_is(example):
    method = kvgauge.build_method("kqsvd", budget=0.5)
    assert kvgauge.build_method(method) == method
    assert kvgauge.build_method(method, budget=0.25).label == "kqsvd@0.25"
    with pytest.raises(kvgauge.UserError, match="unknown field of method kqsvd"):
        kvgauge.build_method(method, bugdet=0.25)


def test_a_class_of_no_module_has_no_version():
    namespace: dict = {"__name__": "__main__"}
    exec(
        "from dataclasses import dataclass\nfrom kvgauge.methods.exact.full import Full\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Loose(Full):\n    name: str = 'loose'\n",
        namespace,
    )
    method: Method = namespace["Loose"]()
    namespace["Loose"].__module__ = "of_no_module"
    with pytest.raises(kvgauge.UserError, match=r"put it into a \.py file and import it"):
        method_version(method)


def test_a_panel_names_classes_too(example):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("config", overrides=["panel=[{_target_: half_cache.HalfCache, name: mine, budget: 0.5}]"])
    assert [setting.method.label for setting in settings(cfg)] == ["mine@0.5"]
