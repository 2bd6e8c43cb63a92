"""Every family serves a model rightly or says in one line why not."""

from __future__ import annotations

import json
import sys

import pytest

import kvgauge
from kvgauge.cli import check
from kvgauge.measure import serving
from kvgauge.measure.serving import METHODS, OTHERS, REFUSED, RIGHT, WRONG, all_methods, findings
from kvgauge.methods.across_layers.subspace_segment import SubspaceSegment
from kvgauge.methods.registry import list_methods


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "ernie4_5", "qwen3_5", "glm4", "gpt2", "mistral-window"])
def test_right_or_refused_in_one_line(name, attached):
    for finding in findings(attached(name)):
        assert finding.verdict in (RIGHT, REFUSED), finding
        assert (finding.verdict == REFUSED) == bool(finding.reason)
        assert "\n" not in finding.reason


def test_every_family_serves_a_llama(attached):
    found = findings(attached("llama"))
    assert [finding.method for finding in found] == list(METHODS)
    assert {finding.verdict for finding in found} == {RIGHT}
    assert all(finding.ratio < 0.52 for finding in found[1:])


def test_every_other_method_serves_a_llama(attached):
    found = findings(attached("llama"), OTHERS)
    assert {finding.method: finding.verdict for finding in found} == dict.fromkeys(OTHERS, RIGHT)
    assert set(METHODS) | set(OTHERS) | {"kvpress/knorm", "kvpress/think"} <= set(all_methods())
    assert {name.partition("/")[0] for name in list_methods()} <= {*all_methods(), "kvpress"}


@pytest.mark.parametrize("name", ["smollm3", "hunyuan", "glm4", "gemma3n", "falcon_h1", "deepseek_v3", "gpt_oss"])
def test_other_methods_are_right_or_refuse(name, attached):
    for finding in findings(attached(name), OTHERS):
        assert finding.verdict in (RIGHT, REFUSED), finding
        assert "\n" not in finding.reason


def test_what_a_cache_stands_for_is_what_it_answers_with(attached, monkeypatch):
    own = SubspaceSegment.mix
    monkeypatch.setattr(serving, "lossless_of", lambda method, facts: None)
    monkeypatch.setattr(SubspaceSegment, "mix", lambda segment, weights: 1.02 * own(segment, weights))
    (finding,) = findings(attached("llama"), {"xkv": {}})
    assert finding.verdict == WRONG and "keys and values that its cache stands for" in finding.reason


def test_a_wrong_number_is_seen(attached, monkeypatch):
    monkeypatch.setattr(serving, "lossless_of", lambda method, facts: kvgauge.build_method("xkv", budget=0.3))
    (finding,) = findings(attached("llama"), {"xkv": {"group_size": 2}})
    assert finding.verdict == WRONG and finding.error > 0.01


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kvgauge check", "model=tiny/llama", "no/model", "--json"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as stop:
        check.main()
    assert stop.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["models"] == 2 and printed["right_in_every_family"] == 1 and printed["wrong"] == 0
    assert {row["verdict"] for row in printed["rows"] if row["model"] == "no/model"} == {REFUSED}


def test_methods_by_name(monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["kvgauge check", "--only", "llama", "--methods", "ksvd", "kvpress/knorm", "--json"]
    )
    with pytest.raises(SystemExit) as stop:
        check.main()
    assert stop.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in printed["rows"]] == ["ksvd", "kvpress/knorm"]
    assert printed["right_in_every_family"] == printed["right_without_presses"] == 1
    monkeypatch.setattr(sys, "argv", ["kvgauge check", "--only", "llama", "--methods", "ksvt"])
    with pytest.raises(SystemExit) as stop:
        check.main()
    assert stop.value.code == 2 and "did you mean 'ksvd'" in capsys.readouterr().err


def test_nothing_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kvgauge check"])
    with pytest.raises(SystemExit) as stop:
        check.main()
    assert stop.value.code == 2
    assert "name a model" in capsys.readouterr().err
