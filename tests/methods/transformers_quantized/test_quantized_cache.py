from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

import kvgauge
from kvgauge.architecture.facts import model_facts
from kvgauge.contract.budget import reference_nbytes
from kvgauge.methods.transformers_quantized import quantized_cache
from kvgauge.methods.transformers_quantized.layer import TransformersQuantizedLayer
from kvgauge.methods.transformers_quantized.quantized_cache import BACKENDS

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
        method.bits_per_number(model_facts(model), bits) / 16 * reference_nbytes(method, model_facts(model), tokens_)
    )
    assert cache.nbytes_by_part()["codes"] == expected


def test_quanto_without_a_compiler_is_refused_in_one_line(tiny, monkeypatch, tmp_path):
    """It compiles the kernel that decodes when it is first used, which takes minutes: no test lets it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    with pytest.raises(kvgauge.UserError, match=r"backend quanto .* install a C\+\+ compiler") as refusal:
        kvgauge.build_method("quantized_cache", backend="quanto", bits=4).new_cache(tiny(NAME))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("bits", [2, 4])
def test_quanto_codes_take_the_bytes_that_the_budget_counts(bits, tiny):
    """Coding needs no kernel."""
    method, facts = kvgauge.build_method("quantized_cache", backend="quanto", bits=bits), model_facts(tiny(NAME))
    keys, values = torch.randn(2, 1, facts.num_key_value_heads, 96, facts.head_dim)
    layer = TransformersQuantizedLayer(method.new_layer(bits, method.group(facts.head_dim, bits)))
    layer.update(keys, values)
    layer.compress()
    assert layer.nbytes_by_part() == {"codes": (keys.numel() * 2) * method.bits_per_number(facts, bits) / 8}


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
