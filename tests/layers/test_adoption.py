"""One prefill for many caches: who may take it over, who needs more of it, and who can be filled without a model."""

from __future__ import annotations

import pytest
import torch

import kvgauge
from kvgauge.architecture.facts import model_facts
from kvgauge.layers.adoption import Prefill
from kvgauge.layers.inputs import LayerInputs

CONTEXT = 128
METHODS = [*kvgauge.list_methods(), "kvpress/snapkv", "kvpress/kvzip"]
FIELDS = {"kqsvd": {"compress_prefill": True}}  # methods that have two kinds of caches


def methods():
    for name in METHODS:
        yield pytest.param(kvgauge.build_method(name), id=name)
    for name, fields in FIELDS.items():
        yield pytest.param(kvgauge.build_method(name, **fields), id=f"{name}-{next(iter(fields))}")


def prefilled(model, ids, inputs=False):
    cache = kvgauge.build_method("full").new_cache(model)
    cache.inputs = LayerInputs(model, cache) if inputs else None
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


@pytest.mark.parametrize("method", methods())
@torch.no_grad()
def test_what_has_adopted_a_prefill_answers_as_after_its_own(method, tiny, fit, tokens):
    model, ids, step = tiny("tiny/llama"), tokens(1, CONTEXT), tokens(1, 3, seed=2)
    fitted = fit(method, "tiny/llama")
    adopted = method.new_cache(model, fitted)
    if adopted.prefill is Prefill.OWN:
        with pytest.raises(kvgauge.UserError, match="its own prefill") as refusal:
            adopted.adopt(prefilled(model, ids))
        assert "\n" not in str(refusal.value)
        return
    watched = adopted.prefill is Prefill.WATCHED
    if watched:
        with pytest.raises(kvgauge.UserError, match="sees more of the prefill"):
            adopted.adopt(prefilled(model, ids))
    own = method.new_cache(model, fitted)
    own.expect(CONTEXT)
    model(ids, past_key_values=own)
    adopted.adopt(prefilled(model, ids, inputs=watched))
    answers = []
    for cache in (own, adopted):
        cache.compress()
        answers.append(model(step, past_key_values=cache).logits)
    assert torch.equal(answers[1], answers[0])
    assert adopted.nbytes_by_part() == own.nbytes_by_part()


@pytest.mark.parametrize("method", methods())
def test_a_method_says_of_its_prefill_what_its_caches_do(method, tiny, fit):
    needed = method.new_cache(tiny("tiny/llama"), fit(method, "tiny/llama")).prefill
    assert (needed is Prefill.OWN) == (not method.needs.exact_prefill)
    assert (needed is Prefill.WATCHED) == (method.needs.exact_prefill and method.needs.sees_inputs)


def test_only_an_exact_prefill_and_only_into_an_empty_cache(tiny, tokens):
    model, ids = tiny("tiny/llama"), tokens(1, CONTEXT)
    source, method = prefilled(model, ids), kvgauge.build_method("full")
    with pytest.raises(kvgauge.UserError, match="uncompressed source into an empty cache"):
        prefilled(model, ids).adopt(source)
    source.compress()
    with pytest.raises(kvgauge.UserError, match="uncompressed source into an empty cache"):
        method.new_cache(model).adopt(source)


@pytest.mark.parametrize("method", methods())
@torch.no_grad()
def test_a_cache_is_filled_without_a_model_or_says_that_it_cannot_be(method, tiny, fit, tokens):
    model, facts = tiny("tiny/llama"), model_facts(tiny("tiny/llama"))
    cache = method.new_cache(model, fit(method, "tiny/llama"))
    states = torch.randn(2, facts.num_key_value_heads, 256, facts.head_dim)
    if not cache.fillable:
        with pytest.raises(kvgauge.UserError, match="run the model") as refusal:
            cache.fill(states, states)
        assert "\n" not in str(refusal.value)
        return
    cache.fill(states, states)
    cache.compress()
    assert cache.get_seq_length() == 256
    model(tokens(2, 1), past_key_values=cache)
    assert cache.get_seq_length() == 257
