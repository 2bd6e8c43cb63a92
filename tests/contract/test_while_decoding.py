"""The option that compresses while decoding: what it says, what it is refused with, and what it makes of a cell."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

import kvgauge
from kvgauge.contract.method import Method
from kvgauge.contract.while_decoding import cell_label, new_cache
from kvgauge.evaluation.cell import Cell
from kvgauge.evaluation.decoding import prefill
from kvgauge.layers.cache import KVCache
from kvgauge.layers.exact import ExactLayer
from kvgauge.provenance import cell_config


@dataclass(frozen=True, kw_only=True)
class Deaf(Method):
    """Takes no notice of the option."""

    name: str = "deaf"

    def new_cache(self, model, fitted=None, *, context_length=None):
        return KVCache([ExactLayer() for _ in range(4)], context_length=context_length)

    def nbytes(self, facts, fitted, tokens):
        return facts.full_nbytes(tokens)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"every": 0}, "every 0 in while_decoding of kqsvd is below 1"),
        ({"every": -3}, "is below 1"),
        ({}, "says no number of tokens"),
        ({"evry": 64}, "did you mean 'every'"),
        ({"every": 2.5}, "whole number"),
        (64, "mapping"),
    ],
)
def test_what_is_no_number_of_tokens_is_refused_in_one_line(given, message):
    with pytest.raises(kvgauge.UserError, match=message) as caught:
        kvgauge.build_method("kqsvd", budget=0.5, while_decoding=given)
    assert "\n" not in str(caught.value)


def test_a_method_that_takes_no_notice_is_refused(tiny):
    model = tiny("tiny/llama")
    assert new_cache(Deaf(), model).every is None
    with pytest.raises(kvgauge.UserError, match="deaf compresses a context once"):
        new_cache(Deaf(while_decoding={"every": 8}), model)


REFUSED = [
    ("xkv", {"fold_every": 16}, "fold_every beside while_decoding"),
    ("xkv", {"group_size": 2, "sr": {"chunk": 24, "budget": 48}}, "not a multiple of sr's chunk 24"),
    ("compose", {"compose": ["full", {"bits": 4, "group": 48}], "budget": 0.9}, "no multiple of the 48 tokens"),
    ("kvslimmer", {"published": True}, "use decided_by: own"),
    ("compose", {"compose": ["kvslimmer", "kqsvd"]}, "leave while_decoding or the merger out"),
    ("compose", {"compose": [{"method": "kqsvd", "while_decoding": {"every": 8}}]}, "option of the whole"),
    ("kvpress/snapkv", {}, "take one of keydiff, knorm"),
    ("kvpress/adakv", {"compression_ratio": 0.5}, "leave while_decoding out"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED, ids=[f"{row[0]}-{row[2][:20]}" for row in REFUSED])
def test_what_cannot_be_combined_is_refused_in_one_line(name, options, message, tiny, fit):
    with pytest.raises(kvgauge.UserError, match=message) as caught:
        method = kvgauge.build_method(name, while_decoding={"every": 64}, **options)
        method.new_cache(tiny("tiny/llama"), fit(method, "tiny/llama"))
    assert "\n" not in str(caught.value)


def test_it_is_part_of_a_cell_s_name_and_of_its_identity(tiny):
    model = tiny("tiny/llama")
    once, often, rarely = (
        kvgauge.build_method("xkv", budget=0.5, while_decoding=given) for given in (None, {"every": 32}, {"every": 64})
    )
    assert [cell_label(method) for method in (once, often, rarely)] == ["xkv@0.5", "xkv@0.5~32", "xkv@0.5~64"]
    cells = [
        Cell(method, "context", None, cell_config(model, method, None, "context")) for method in (once, often, rarely)
    ]
    assert len({cell.fingerprint for cell in cells}) == 3
    assert [cell.budget for cell in cells] == [0.5] * 3
    assert often.sized(0.25).every == 32


def test_steps_of_one_shape_cannot_compress(tiny, tokens):
    model = tiny("tiny/llama")
    cache = kvgauge.build_method("full", while_decoding={"every": 8}).new_cache(model)
    prefill(model, tokens(1, 20), cache)
    cache.compress()
    with pytest.raises(kvgauge.UserError, match="leave while_decoding out"):
        cache.fix_shapes(4)
