"""The parity gate: at full rank or full size every method gives the uncompressed logits, on every architecture."""

from __future__ import annotations

import pytest
import torch

import kvgauge
from kvgauge import configuration
from kvgauge.architecture.facts import model_facts
from kvgauge.contract.roles import lossless_of
from kvgauge.testing import check_lossless, padded_and_alone, relative_error

ARCHITECTURES = [name for name in configuration.names("model") if name.startswith("tiny/")]
CONTEXT = 96
# Methods with a setting that loses nothing; the others return None and are compared with themselves.
LOSSLESS = [
    name
    for name in kvgauge.list_methods()
    if lossless_of(kvgauge.build_method(name), model_facts(kvgauge.load_model("tiny/llama")[0])) is not None
]


def lossless(name, model_name, tiny, fit):
    method = lossless_of(kvgauge.build_method(name), model_facts(tiny(model_name)))
    assert method is not None, f"{name} has no lossless setting"
    return method, fit(method, model_name)


def new_cache(method, fitted, model, context_length=None):
    cache = method.new_cache(model, fitted, context_length=context_length)
    cache.expect(CONTEXT)
    return cache


def supported(name, model_name, tiny, fit):
    """Methods may refuse an architecture, in one line."""
    try:
        method, fitted = lossless(name, model_name, tiny, fit)
        tiny(model_name)(torch.tensor([[5, 6]]), past_key_values=method.new_cache(tiny(model_name), fitted))
    except kvgauge.UserError as refusal:
        assert "\n" not in str(refusal)
        assert model_facts(tiny(model_name)).latent is not None, f"{name} refuses {model_name}: {refusal}"
        return None
    return method, fitted


@pytest.mark.parametrize("model_name", ARCHITECTURES)
@pytest.mark.parametrize("name", LOSSLESS)
def test_logits_of_the_uncompressed_model(name, model_name, tiny, fit):
    known = supported(name, model_name, tiny, fit)
    if known is not None:
        assert check_lossless(kvgauge.build_method(name), tiny(model_name), known[1])


@pytest.mark.parametrize("model_name", ["tiny/llama", "tiny/qwen3"])
@pytest.mark.parametrize("name", kvgauge.list_methods())
def test_left_padding_changes_nothing(name, model_name, tiny, fit):
    method = kvgauge.build_method(name)
    method = method if name == "full" else kvgauge.build_method(name, budget=0.8)
    actual, expected = padded_and_alone(method, tiny(model_name), fit(method, model_name))
    if per_row_budget(name):
        assert relative_error(actual, expected) < 1e-4
    else:  # a budget of the batch's length buys the shorter row a little more
        assert relative_error(actual[0], expected[0]) < 1e-4


# Sizes that do not depend on the length of the context, for the methods whose budgets do.
OWN_SIZES = {
    "asymkv": {"max_entries": 60, "start": 4, "window": 16},
    "kvslimmer": {"max_entries": 60, "start": 4, "window": 16},
    "mean_merge": {"max_entries": 60, "start": 4, "window": 16},
    "minicache": {"budget": None, "gamma": 0.5},
    "single_svd": {"rank_k": 12, "rank_v": 16},
    "streaming_llm": {"max_entries": 60, "start": 4, "window": 16},
    "xkv": {"rank_k": 24, "rank_v": 32},
}


@pytest.mark.parametrize("name", OWN_SIZES)
def test_left_padding_changes_no_row_of_a_method_with_a_size_of_its_own(name, tiny, fit):
    method = kvgauge.build_method(name, **OWN_SIZES[name])
    actual, expected = padded_and_alone(method, tiny("tiny/llama"), fit(method, "tiny/llama"))
    exact = kvgauge.build_method("full")
    whole, _ = padded_and_alone(exact, tiny("tiny/llama"), None)
    assert relative_error(actual, whole) > 1e-3, "nothing was compressed"
    assert relative_error(actual[0], expected[0]) < 1e-3
    assert relative_error(actual[1], expected[1]) < 1e-3


def per_row_budget(name):
    """Methods whose sizes do not depend on the length of the context give every row what it gets alone."""
    return name in ("full", "ksvd", "eigen", "kqsvd", "kvquant")


@pytest.mark.parametrize("name", [name for name in kvgauge.list_methods() if name not in LOSSLESS])
def test_generate_is_the_loop_of_forward_passes(name, tiny, fit, tokens):
    method, model = kvgauge.build_method(name), tiny("tiny/llama")
    fitted, ids = fit(method, "tiny/llama"), tokens(1, CONTEXT, seed=7)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    actual = model.generate(ids, past_key_values=new_cache(method, fitted, model, CONTEXT), **settings)
    cache, expected, step = new_cache(method, fitted, model), ids, ids
    with torch.no_grad():
        for _ in range(6):
            step = model(step, past_key_values=cache).logits[:, -1:].argmax(-1)
            cache.compress()
            expected = torch.cat([expected, step], dim=1)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", LOSSLESS)
def test_generate_with_a_cache_that_compresses_by_itself(name, tiny, fit, tokens):
    method, fitted = lossless(name, "tiny/llama", tiny, fit)
    model = tiny("tiny/llama")
    ids = tokens(1, CONTEXT, seed=7)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **settings)
    cache = new_cache(method, fitted, model, context_length=CONTEXT)
    actual = model.generate(ids, past_key_values=cache, **settings)
    assert cache.compressed
    assert cache.compressed_tokens == CONTEXT
    assert torch.equal(actual, expected)
