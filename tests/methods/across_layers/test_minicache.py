"""MiniCache: which layers are joined, what a budget buys, and what it cannot reach."""

from __future__ import annotations

import pytest
import torch

import kvgauge
from kvgauge.errors import UserError


def compressed(model, method, ids):
    cache = method.new_cache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.compress()
    return cache


def test_pairs_start_in_the_middle():
    method = kvgauge.build_method("minicache")
    assert method.pairs(30) == [15, 17, 19, 21, 23, 25, 27]  # layer 29 is left over
    assert method.pairs(4) == [2]
    assert kvgauge.build_method("minicache", start_layer=1).pairs(6) == [1, 3]


def test_bytes_of_directions_lengths_and_retained_tokens(tiny, tokens):
    model, context = tiny("tiny/llama"), 200
    cache = compressed(model, kvgauge.build_method("minicache", gamma=1.0), tokens(1, context))
    retained = sum(len(states.columns) for states in (cache.layers[2].pair.keys, cache.layers[2].pair.values))
    assert retained == 2  # the most distant token of the keys, and that of the values
    assert cache.nbytes_by_part() == {
        "keys": 2 * context * 32 * 4,
        "values": 2 * context * 32 * 4,
        "directions": 2 * context * 32 * 4,
        "lengths": 2 * 2 * context * 2 * 4,
        "retained": 2 * retained * 32 * 4,
        "columns": retained * 4,
    }


@pytest.mark.parametrize("options", [{"budget": 0.9}, {"budget": 0.7, "start_layer": 0}])
def test_a_budget_buys_retained_tokens(options, tiny, tokens):
    model = tiny("tiny/llama")
    cache = compressed(model, kvgauge.build_method("minicache", **options), tokens(1, 400))
    ratio = cache.nbytes() / kvgauge.full_nbytes(model, 400)
    assert options["budget"] - 0.01 < ratio <= options["budget"]


def test_a_budget_out_of_reach_says_what_is_reached(tiny):
    with pytest.raises(UserError, match=r"below the 0\.781 that merging 1 pairs of 4 layers reaches"):
        kvgauge.build_method("minicache", budget=0.5).new_cache(tiny("tiny/llama"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_layer": 4}, "out of range"),
        ({"start_layer": 3}, "no pair"),
        ({"gamma": 1.5}, "gamma"),
        ({"interpolation": -0.1}, "interpolation"),
    ],
)
def test_bad_input_is_one_line(options, message, tiny):
    with pytest.raises(UserError, match=message):
        kvgauge.build_method("minicache", **options).new_cache(tiny("tiny/llama"))


def test_latents_are_refused(tiny):
    with pytest.raises(UserError, match="MLA"):
        kvgauge.build_method("minicache").new_cache(tiny("tiny/deepseek_v2"))


def test_pairs_that_rotate_differently_are_refused(attached, tokens):
    with pytest.raises(UserError, match=r"layers 2 and 3 of SmolLM3ForCausalLM, which rotate differently"):
        kvgauge.build_method("minicache", start_layer=2).new_cache(attached("smollm3"))
    cache = kvgauge.build_method("minicache", start_layer=2, gamma=0.0).new_cache(attached("hunyuan"))  # norms differ
    ids = tokens(1, 90)
    with torch.no_grad():
        expected = attached("hunyuan")(ids).logits[:, 80:]
        attached("hunyuan")(ids[:, :80], past_key_values=cache)
        cache.compress()
        found = attached("hunyuan")(ids[:, 80:], past_key_values=cache).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
