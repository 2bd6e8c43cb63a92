"""The parity gate on the embedded language model, whose activations are those of a trained model."""

from __future__ import annotations

import pytest
import torch

import kvgauge
from kvgauge.architecture.facts import full_nbytes, model_facts
from kvgauge.contract.roles import lossless_of
from kvgauge.evaluation.decoding import prefill

TEXT = "The committee met on Tuesday. It heard three reports, adopted two of them and sent the third one back. " * 12
CONTEXT = 160


@pytest.fixture(scope="module")
def embedded():
    """All that needs the model's numbers stands in this file, so that one process of several loads them."""
    return kvgauge.load_model("smollm2-135m")


@pytest.fixture(scope="module")
def answered(embedded):
    """The model, a text, its moments, and the logits of what follows the context."""
    model, tokenizer = embedded
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, : CONTEXT + 24]
    moments = kvgauge.collect(model, [ids])
    with torch.no_grad():
        expected = model(ids).logits[:, CONTEXT:]
    return model, ids, moments, expected


@pytest.mark.parametrize("name", kvgauge.list_methods())
def test_lossless_settings_give_the_model_s_logits(name, answered):
    model, ids, moments, expected = answered
    lossless = lossless_of(kvgauge.build_method(name), model_facts(model))
    method = lossless or kvgauge.build_method(name)
    cache = method.new_cache(model, method.fit(moments, model))
    cache.expect(CONTEXT)
    with torch.no_grad():
        model(ids[:, :CONTEXT], past_key_values=cache)
        cache.compress()
        asked = model(ids[:, CONTEXT:-1], past_key_values=cache).logits
        decoded = model(ids[:, -1:], past_key_values=cache).logits
    actual = torch.cat([asked, decoded], dim=1)
    error = float((actual - expected).norm() / expected.norm())
    if lossless is None:  # the method loses at every setting: little at its default
        assert error < 0.05
        return
    assert error < 1e-4
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize(
    "name", ["full", "kqsvd", "xkv", "minicache", "streaming_llm", "kvslimmer", "kvquant", "kvpress/knorm"]
)
def test_lossless_settings_that_compress_while_decoding_write_the_same_tokens(name, answered):
    model, ids, moments, expected = answered
    method = lossless_of(kvgauge.build_method(name, while_decoding={"every": 8}), model_facts(model))
    cache = method.new_cache(model, method.fit(moments, model))
    prefill(model, ids[:, :CONTEXT], cache)
    cache.compress()
    with torch.no_grad():
        actual = torch.cat(
            [model(part, past_key_values=cache).logits for part in ids[:, CONTEXT:].split(4, dim=1)], dim=1
        )
    assert [one.tokens for one in cache.recompressions] == [CONTEXT + 8, CONTEXT + 16, CONTEXT + 24]
    assert float((actual - expected).norm() / expected.norm()) < 1e-4
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", ["kqsvd", "xkv", "kvslimmer"])
def test_half_the_bytes_are_gone(name, answered):
    model, ids, moments, _ = answered
    method = kvgauge.build_method(name, budget=0.5)
    cache = method.new_cache(model, method.fit(moments, model))
    cache.expect(CONTEXT)
    with torch.no_grad():
        model(ids[:, :CONTEXT], past_key_values=cache)
    cache.compress()
    assert 0.47 < cache.nbytes() / full_nbytes(model, CONTEXT) <= 0.51


def test_it_answers(embedded):
    model, tokenizer = embedded
    facts = model_facts(model)
    assert (facts.num_layers, facts.num_attention_heads, facts.num_key_value_heads, facts.head_dim) == (30, 9, 3, 64)
    assert kvgauge.full_nbytes(model, 10) == 2 * 30 * 3 * 64 * 4 * 10
    answer = kvgauge.generate(
        model,
        tokenizer,
        "The capital of France is Paris. ",
        "What is the capital of France?",
        kvgauge.build_method("full"),
    )
    assert "Paris" in answer


@pytest.mark.parametrize("name", ["kvpress/kvzip", "kvpress/kvgrad"])
def test_presses_that_replay_the_context(name, embedded):
    model, tokenizer = embedded
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, :120]
    cache = kvgauge.build_method(name).new_cache(model)
    with torch.no_grad():
        for part in ids.split(80, dim=1):
            model(part, past_key_values=cache)
        cache.compress()
    assert cache.nominal_share == 0.5
    kept = torch.stack([layer.kept for layer in cache.layers]).float().mean()
    assert float(kept) == pytest.approx(0.5, abs=1e-3)
    assert cache.get_seq_length() == cache.physical_length() == 120
    with torch.no_grad():
        assert model(ids[:, :3], past_key_values=cache).logits.isfinite().all()
