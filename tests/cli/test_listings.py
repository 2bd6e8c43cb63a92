"""`kvgauge methods` and `kvgauge models`: everything that has a name, with what it needs."""

from __future__ import annotations

import json
import sys

import pytest

import kvgauge
from kvgauge import configuration
from kvgauge.cli import methods, models


def output(module, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["kvgauge listing", *arguments])
    module.main()
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def rows():
    return {row["name"]: row for row in methods.rows()}


def test_every_method_is_there(rows):
    assert set(rows) == {*configuration.names("method")} | set(kvgauge.list_methods())
    for name, row in rows.items():
        assert row["about"] and row["stores"], name
        assert not row["stores"].startswith(type(row).__name__)


@pytest.mark.parametrize(
    ("name", "family", "needs"),
    [
        ("full", "exact", []),
        ("kqsvd", "per_head", ["fit"]),
        ("xkv", "across_layers", []),
        ("xkv_aware", "across_layers", ["fit"]),
        ("kvslimmer", "merging", ["streams"]),
        ("kvquant", "kvquant", ["fit", "16 bits"]),
        ("quantized_cache", "transformers_quantized", ["16 bits", "hqq"]),
        ("kvpress/snapkv", "pressed", ["inputs", "alone", "kvpress"]),
        ("kvpress/kvzip", "pressed", ["streams", "inputs", "alone", "kvpress"]),
    ],
)
def test_families_and_needs(rows, name, family, needs):
    assert (rows[name]["family"], rows[name]["needs"]) == (family, needs)


def test_needs_are_those_of_the_method(rows):
    for name in kvgauge.list_methods():
        asked = kvgauge.build_method(name).needs
        assert ("fit" in rows[name]["needs"]) == (asked.learns is not None)
        assert ("streams" in rows[name]["needs"]) == (not asked.exact_prefill)


def test_the_table_has_a_chapter_per_family(monkeypatch, capsys):
    lines = output(methods, monkeypatch, capsys).splitlines()
    chapters = [line for line in lines[:-1] if line and not line.startswith(" ")]
    assert "per_head: Low rank per head: K-SVD, Eigen and KQ-SVD, and the caches of their latents." in chapters
    assert len(chapters) == len({row["family"] for row in methods.rows()})
    [kqsvd] = [line.split() for line in lines if line.startswith("  kqsvd ")]
    assert kqsvd[:3] == ["kqsvd", "fit", "KQ-SVD:"]
    assert any(line.startswith("  kvpress/: ") for line in lines)


def test_json_lists(monkeypatch, capsys):
    found = json.loads(output(methods, monkeypatch, capsys, "--json"))
    assert {row["name"]: row for row in found} == {row["name"]: row for row in methods.rows()}
    found = json.loads(output(models, monkeypatch, capsys, "--json"))
    assert [row["name"] for row in found] == configuration.names("model")
    [tiny] = [row for row in found if row["name"] == "tiny/llama"]
    assert (tiny["source"], tiny["dtype"]) == ("random", "float32") and "Llama" in tiny["about"]


def test_a_directory_of_one_s_own(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(configuration, "_added", [])
    for group, text in (
        ("method", "# Mine.\n_target_: kvgauge.methods.exact.full.Full\nname: mine\n"),
        ("model", "# My model.\n_target_: kvgauge.models.spec.ModelSpec\nname: own\nsource: /models/own\n"),
    ):
        (tmp_path / group).mkdir()
        (tmp_path / group / "own.yaml").write_text(text)
    assert "  own " in output(methods, monkeypatch, capsys, "--config-dir", str(tmp_path))
    [line] = [line for line in output(models, monkeypatch, capsys).splitlines() if line.startswith("own ")]
    assert line.split() == ["own", "/models/own", "float32", "My", "model."]


def test_a_method_that_cannot_be_built_is_listed_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(configuration, "_added", [])
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "torn.yaml").write_text("_target_: no_such_package.Method\nname: torn\n")
    configuration.add_directory(tmp_path)
    [torn] = [row for row in methods.rows() if row["name"] == "torn"]
    assert torn["family"] == "cannot be built" and "no module 'no_such_package'" in torn["about"]
    assert "cannot be built" in methods.table([torn])
