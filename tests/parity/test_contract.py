"""What every cache promises to other people's loops: beams, cropping, reordering, dense views."""

from __future__ import annotations

import pytest
import torch

import kvgauge
from kvgauge.architecture.facts import model_facts
from kvgauge.contract.roles import lossless_of

CONTEXT = 64
METHODS = kvgauge.list_methods()


def gentlest(name, model):
    """The setting that loses nothing, or the method as it comes where there is none."""
    return lossless_of(kvgauge.build_method(name), model_facts(model)) or kvgauge.build_method(name)


def always_loses(name):
    return lossless_of(kvgauge.build_method(name), model_facts(kvgauge.load_model("tiny/llama")[0])) is None


def filled(name, tiny, fit, ids):
    model = tiny("tiny/llama")
    method = gentlest(name, model)
    cache = method.new_cache(model, fit(method, "tiny/llama"))
    cache.expect(ids.shape[1])
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.compress()
    return model, cache


def following(name, tiny, fit, ids, step):
    """The logits of `step` behind `ids`: the model's, or those of a cache of its own for a method that always loses."""
    model = tiny("tiny/llama")
    if not always_loses(name):
        return model(torch.cat([ids, step], dim=1)).logits[:, -step.shape[1] :]
    _, cache = filled(name, tiny, fit, ids)
    return model(step, past_key_values=cache).logits


@pytest.mark.parametrize("name", METHODS)
def test_reordering_follows_the_beams(name, tiny, fit, tokens):
    ids, step = tokens(2, CONTEXT, seed=2), tokens(2, 1, seed=3)
    model, cache = filled(name, tiny, fit, ids)
    swap = torch.tensor([1, 0])
    try:
        cache.reorder_cache(swap)
    except kvgauge.UserError as refusal:
        assert "\n" not in str(refusal)
        return
    with torch.no_grad():
        actual = model(step, past_key_values=cache).logits
        expected = following(name, tiny, fit, ids[swap], step)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_cropping_decoded_tokens_or_one_line(name, tiny, fit, tokens):
    ids, wrong, step = tokens(1, CONTEXT, seed=2), tokens(1, 5, seed=3), tokens(1, 2, seed=4)
    model, cache = filled(name, tiny, fit, ids)
    with torch.no_grad():
        model(wrong, past_key_values=cache)
        try:
            cache.crop(-5)
        except kvgauge.UserError as refusal:
            assert "\n" not in str(refusal)
            return
        assert cache.get_seq_length() == CONTEXT
        actual = model(step, past_key_values=cache).logits
        expected = following(name, tiny, fit, ids, step)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_beam_search_works_or_says_so(name, tiny, fit, tokens):
    model = tiny("tiny/llama")
    method = gentlest(name, model)
    ids = tokens(1, 24, seed=8)
    settings = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    settings["attention_mask"] = torch.ones_like(ids)
    expected = model.generate(ids, **settings)
    try:
        cache = method.new_cache(model, fit(method, "tiny/llama"), context_length=24)
        actual = model.generate(ids, past_key_values=cache, **settings)
    except kvgauge.UserError as refusal:
        assert "\n" not in str(refusal)
        return
    if not always_loses(name):
        assert torch.equal(actual, expected)
    assert actual.shape == expected.shape


@pytest.mark.parametrize("name", METHODS)
def test_dense_is_what_the_model_saw_or_one_line(name, tiny, fit, tokens):
    ids = tokens(1, CONTEXT, seed=2)
    _, cache = filled(name, tiny, fit, ids)
    _, exact = filled("full", tiny, fit, ids)
    for layer in range(len(cache)):
        try:
            keys, values = cache.dense(layer)
        except kvgauge.UserError as refusal:
            assert "\n" not in str(refusal)
            return
        for seen, expected in zip((keys, values), exact.dense(layer), strict=True):
            if always_loses(name):
                assert float((seen - expected).norm() / expected.norm()) < 0.05
            else:
                torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_a_second_compress_and_a_reset(name, tiny, fit, tokens):
    ids = tokens(1, CONTEXT, seed=2)
    _, cache = filled(name, tiny, fit, ids)
    before = cache.nbytes()
    cache.compress()
    assert cache.nbytes() == before
    cache.reset()
    assert cache.get_seq_length() == 0
    assert not cache.compressed


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_attention_to_the_entries_is_attention_to_what_they_stand_for(name, compressed, tiny, fit, tokens):
    model, method = tiny("tiny/llama"), kvgauge.build_method(name)
    cache = method.new_cache(model, fit(method, "tiny/llama"))
    cache.expect(256)
    model(tokens(2, 256, seed=2), past_key_values=cache)
    if compressed:
        cache.compress()
        model(tokens(2, 1, seed=3), past_key_values=cache)
    before = (cache.nbytes(), cache.get_seq_length(), cache.physical_length(), cache.remarks())
    query = torch.randn(2, 4, 1, 16, generator=torch.Generator().manual_seed(4))
    for index, layer in enumerate(cache.layers):
        actual = layer.attend_entries(query, 0.25)
        assert actual.shape == (2, 1, 4, 16)
        torch.testing.assert_close(layer.attend_entries(query, 0.25), actual, rtol=0, atol=0)
        try:
            keys, values = cache.dense(index)
        except kvgauge.UserError:
            continue
        expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=0.25, enable_gqa=True)
        torch.testing.assert_close(actual, expected.transpose(1, 2), rtol=1e-3, atol=1e-3)
    assert (cache.nbytes(), cache.get_seq_length(), cache.physical_length(), cache.remarks()) == before
