"""The parity gate on the embedded language model, whose activations are those of a trained model."""

from __future__ import annotations

import pytest
import torch

import kvgauge
from kvgauge.architecture.facts import full_nbytes, model_facts
from kvgauge.contract.roles import lossless_of

TEXT = "The committee met on Tuesday. It heard three reports, adopted two of them and sent the third one back. " * 12
CONTEXT = 160
pytestmark = pytest.mark.xdist_group("embedded")


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
