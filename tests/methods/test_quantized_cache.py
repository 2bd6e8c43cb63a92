from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

import kvgauge
from kvgauge.methods import quantized_cache
from kvgauge.methods.quantized_cache import BACKENDS
from kvgauge.models.facts import model_facts

NAME = "tiny/llama"


def answer(method, model, ids, question):
    cache = method.new_cache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.compress()
        return model(question, past_key_values=cache).logits, cache


def test_logits_come_nearer_with_bits(tiny, tokens):
    model, ids, question = tiny(NAME), tokens(1, 200, seed=5), tokens(1, 12, seed=6)
    with torch.no_grad():
        expected = model(torch.cat([ids, question], dim=1)).logits[:, 200:]
    errors = []
    for bits in (2, 4, 8):
        actual, _ = answer(kvgauge.build_method("quantized_cache", bits=bits), model, ids, question)
        errors.append(float((actual - expected).norm() / expected.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02


@pytest.mark.parametrize("tokens_", [64, 97])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_are_those_that_the_budget_counts(bits, tokens_, tiny, tokens):
    method, model = kvgauge.build_method("quantized_cache", bits=bits), tiny(NAME)
    _, cache = answer(method, model, tokens(1, tokens_), tokens(1, 1))
    expected = (
        method.bits_per_number(model_facts(model), bits) / 16 * method.reference_nbytes(model_facts(model), tokens_)
    )
    assert cache.nbytes_by_part()["codes"] == expected


def test_quanto_answers_or_says_what_it_lacks(tiny, tokens):
    """It compiles its kernels at first use, which takes a compiler."""
    method, model = kvgauge.build_method("quantized_cache", backend="quanto", bits=4), tiny(NAME)
    ids, question = tokens(1, 101, seed=5), tokens(1, 12, seed=6)
    try:
        actual, cache = answer(method, model, ids, question)
    except kvgauge.UserError as refusal:
        assert "compiler" in str(refusal)
        return
    with torch.no_grad():
        expected = model(torch.cat([ids, question], dim=1)).logits[:, 101:]
    assert float((actual - expected).norm() / expected.norm()) < 0.3
    numbers = model_facts(model).cached_width * model_facts(model).num_layers * 101
    assert cache.nbytes_by_part()["codes"] == numbers * method.bits_per_number(model_facts(model), 4) / 8


def test_a_missing_package_is_named(tiny, monkeypatch):
    monkeypatch.setitem(BACKENDS, "hqq", replace(BACKENDS["hqq"], module="hqq_that_is_not_there"))
    with pytest.raises(kvgauge.UserError, match="pip install hqq"):
        kvgauge.build_method("quantized_cache").new_cache(tiny(NAME))
    assert not quantized_cache.installed("not_there.at_all")
    assert importlib.util.find_spec("hqq") is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "hqq can do 2, 4, 8"),
        ({"bits": 8, "backend": "quanto"}, "quanto can do 2, 4"),
        ({"backend": "hqqq"}, "did you mean 'hqq'"),
        ({"budget": None}, "needs a budget, or bits"),
        ({"group_size": 0}, "1 or more"),
        ({"residual_length": 0}, "1 or more"),
    ],
)
def test_bad_values(change, message):
    with pytest.raises(kvgauge.UserError, match=message):
        kvgauge.build_method("quantized_cache", **change)


def test_a_budget_that_scales_alone_exceed(tiny):
    with pytest.raises(kvgauge.UserError, match=r"budget 0\.1 of quantized_cache is below"):
        kvgauge.build_method("quantized_cache", budget=0.1).new_cache(tiny(NAME))


def test_latents_are_refused(tiny):
    with pytest.raises(kvgauge.UserError, match="use xkv"):
        kvgauge.build_method("quantized_cache").new_cache(tiny("tiny/deepseek_v2"))
