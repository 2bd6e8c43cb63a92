"""Per-head latents: stored bytes, attention in r dimensions, sinks, windows, and prefills that compress as they go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kvgauge
from kvgauge.architecture.facts import model_facts
from kvgauge.attend.mask import Mask
from kvgauge.evaluation.decoding import prefill
from kvgauge.kernels.cpu.decode_attention import decode_attention
from kvgauge.layers.cache import KVCache
from kvgauge.methods.per_head import latents
from kvgauge.methods.per_head.latents import HeadProjections, LatentLayer
from kvgauge.methods.per_head.streaming_latents import StreamingLatentLayer

ARCHITECTURES = ("tiny/llama", "tiny/mistral", "tiny/qwen2", "tiny/qwen3")
EXACT = pytest.mark.parametrize("exact", [{}, {"sinks": 3}, {"window": 9}, {"sinks": 5, "window": 20}])


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def kqsvd(**fields: object):
    return kvgauge.build_method("kqsvd", **fields)


def layer_of(rank_k: int, rank_v: int, **exact: int) -> tuple[KVCache, HeadProjections]:
    generator = torch.Generator().manual_seed(0)
    pairs = HeadProjections(
        *(torch.randn(2, 8, rank, generator=generator) for rank in (rank_k, rank_k, rank_v, rank_v))
    )
    return KVCache([LatentLayer(lambda tokens: pairs, **exact)]), pairs


@EXACT
@pytest.mark.parametrize("padded", [False, True])
def test_single_queries_attend_in_the_compiled_kernel(exact, padded, monkeypatch) -> None:
    cache, _ = layer_of(3, 5, **exact)
    layer, generator = cache.layers[0], torch.Generator().manual_seed(1)
    layer.update(*(torch.randn(2, 2, 70, 8, generator=generator) for _ in range(2)))
    layer.compress()
    query, mask = torch.randn(2, 4, 1, 8, generator=generator), None
    if padded:
        mask = torch.ones(2, 1, 1, 70, dtype=torch.bool)
        mask[0, :, :, :30] = False
    made: list[bool] = []

    def watched(*arguments, **options):
        result = decode_attention(*arguments, **options)
        made.append(result is not None)
        return result

    monkeypatch.setattr(latents, "decode_attention", watched)
    compiled = layer.attend(query, mask=Mask.of(mask), scaling=0.3, position_ids=None)
    monkeypatch.setattr(latents, "decode_attention", lambda *a, **k: None)
    products = layer.attend(query, mask=Mask.of(mask), scaling=0.3, position_ids=None)
    torch.testing.assert_close(compiled, products)
    assert made == [True]  # the kernel answered, it did not decline


def test_attention_in_latents_is_attention_to_the_rebuilt_keys_and_values() -> None:
    cache, pairs = layer_of(3, 5)
    layer, generator = cache.layers[0], torch.Generator().manual_seed(1)
    keys, values = (torch.randn(2, 2, 12, 8, generator=generator) for _ in range(2))
    layer.update(keys, values)
    layer.compress()
    query = torch.randn(2, 4, 1, 8, generator=generator)
    output = layer.attend(query, mask=Mask.of(None), scaling=0.3, position_ids=None)
    rebuilt_keys, rebuilt_values = keys @ pairs.A @ pairs.B.mT, values @ pairs.A_v @ pairs.B_v.mT
    grouped = query.view(2, 2, 2, 8)
    expected = torch.softmax(0.3 * grouped @ rebuilt_keys.mT, dim=-1) @ rebuilt_values
    assert relative(output.view(2, 2, 2, 8), expected) < 1e-5
    dense_keys, dense_values = layer.dense()
    assert relative(dense_keys, rebuilt_keys) < 1e-5
    assert relative(dense_values, rebuilt_values) < 1e-5


def test_bytes_are_those_of_the_latents_alone() -> None:
    cache, pairs = layer_of(3, 5)
    states = torch.randn(2, 2, 100, 8)
    cache.update(states, states, 0)
    cache.compress()
    assert cache.nbytes_by_part() == {"latent_keys": 2 * 2 * 100 * 3 * 4, "latent_values": 2 * 2 * 100 * 5 * 4}
    assert cache.fixed_nbytes() == pairs.nbytes() == 2 * 8 * (3 + 3 + 5 + 5) * 4


@EXACT
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_compressing_prefill_at_full_rank_gives_the_models_logits(name, exact, tiny, fit, tokens) -> None:
    model, head_dim = tiny(name), model_facts(tiny(name)).head_dim
    method = kqsvd(rank=head_dim, compress_prefill=True, **exact)
    ids = tokens(2, 90, seed=5)
    cache = method.new_cache(model, fit(method, name))
    first = prefill(model, ids[:, :70], cache, chunk=16)
    cache.compress()
    rest = model(ids[:, 70:-1], past_key_values=cache).logits
    last = model(ids[:, -1:], past_key_values=cache).logits
    expected = model(ids).logits
    assert relative(first, expected[:, 69]) < 1e-4
    assert relative(torch.cat([rest, last], dim=1), expected[:, 70:]) < 1e-4
    assert cache.compressed_tokens == 70


@EXACT
def test_one_chunk_is_the_prefill_of_the_model_and_the_cache_of_a_later_compression(exact, tiny, fit, tokens) -> None:
    model, ids = tiny("tiny/llama"), tokens(2, 64, seed=6)
    caches = []
    for streaming in (False, True):
        method = kqsvd(budget=0.9, compress_prefill=streaming, **exact)
        cache = method.new_cache(model, fit(method, "tiny/llama"))
        assert relative(prefill(model, ids, cache), model(ids).logits[:, -1]) < 1e-5
        cache.compress()
        caches.append(cache)
    later, streamed = caches
    assert streamed.nbytes_by_part() == later.nbytes_by_part()
    for layer in range(len(later.layers)):
        for one, other in zip(streamed.dense(layer), later.dense(layer), strict=True):
            assert relative(one, other) < 1e-5


@pytest.mark.parametrize("exact", [{}, {"sinks": 3, "window": 9}])
def test_padded_rows_of_a_compressing_prefill(exact, tiny, fit, tokens) -> None:
    model, ids = tiny("tiny/llama"), tokens(2, 60, seed=7)
    method = kqsvd(rank=model_facts(model).head_dim, compress_prefill=True, **exact)
    mask = torch.ones(2, 60, dtype=torch.bool)
    mask[1, :20] = False  # longer than the first chunk: its sinks come with the second
    cache = method.new_cache(model, fit(method, "tiny/llama"))
    logits = prefill(model, ids, cache, chunk=16, mask=mask)
    alone = model(ids[1:, 20:]).logits[:, -1]
    assert relative(logits[1:], alone) < 1e-4
    cache.compress()
    step = ids[:, :1]
    mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
    positions = (mask.cumsum(dim=1) - 1)[:, -1:]
    decoded = model(step, past_key_values=cache, attention_mask=mask, position_ids=positions).logits[1]
    expected = model(torch.cat([ids[1:, 20:], step[1:]], dim=1)).logits[:, -1]
    assert relative(decoded, expected) < 1e-4


def test_no_layer_keeps_exact_keys_between_chunks(tiny, fit, tokens) -> None:
    model = tiny("tiny/llama")
    method = kqsvd(budget=0.5, compress_prefill=True)
    cache = method.new_cache(model, fit(method, "tiny/llama"))
    ids = tokens(1, 256, seed=8)
    for part in ids.split(64, dim=1):
        model(part, past_key_values=cache)
        assert "exact" not in cache.nbytes_by_part()
    assert cache.nbytes() <= 0.5 * kvgauge.full_nbytes(model, 256)
    assert cache.get_seq_length() == 256


def test_the_exact_window_is_all_that_stays_between_chunks(tiny, fit, tokens) -> None:
    model, facts = tiny("tiny/llama"), model_facts(tiny("tiny/llama"))
    method = kqsvd(budget=0.6, compress_prefill=True, window=10)
    cache = method.new_cache(model, fit(method, "tiny/llama"))
    prefill(model, tokens(1, 256, seed=8), cache, chunk=64)
    assert cache.nbytes_by_part()["exact"] == facts.full_nbytes(10)


@pytest.mark.parametrize("exact", [{}, {"sinks": 3}, {"sinks": 2, "window": 10}])
def test_the_latents_of_all_layers_have_their_place_before_any_layer_attends(exact, tiny, fit, tokens) -> None:
    model, ids = tiny("tiny/llama"), tokens(1, 256, seed=9)
    method = kqsvd(budget=0.6, compress_prefill=True, **exact)
    cache = method.new_cache(model, fit(method, "tiny/llama"))
    cache.expect(256)
    places = []
    for part in ids.split(64, dim=1):
        model(part, past_key_values=cache)
        places.append([(layer.latent_keys.nbytes(), layer.latent_keys.view().data_ptr()) for layer in cache.layers])
    cache.compress()
    assert all(place == places[0] for place in places)
    assert [(layer.latent_keys.nbytes(), layer.latent_keys.view().data_ptr()) for layer in cache.layers] == places[0]
    assert cache.nbytes() <= 0.6 * kvgauge.full_nbytes(model, 256)


def test_the_first_layer_that_attends_finds_the_memory_of_the_last(tiny, fit, tokens) -> None:
    model = tiny("tiny/llama")
    method = kqsvd(budget=0.5, compress_prefill=True)
    cache = method.new_cache(model, fit(method, "tiny/llama"), context_length=64)
    first, last = cache.layers[0], cache.layers[-1]
    states = torch.randn(1, last.source(64).A.shape[0], 16, model_facts(model).head_dim)
    first.update(states, states)
    queries = torch.randn(1, model_facts(model).num_attention_heads, 16, model_facts(model).head_dim)
    first.attend(queries, mask=Mask.of(None), scaling=1.0, position_ids=None)
    assert len(last.latent_keys) == 0
    assert last.latent_keys.nbytes() == first.latent_keys.nbytes() > 0


def test_a_compressing_prefill_says_so_and_its_siblings_do_not() -> None:
    assert kqsvd(budget=0.5).needs.exact_prefill
    assert not kqsvd(budget=0.5, compress_prefill=True).needs.exact_prefill


def test_a_budget_with_exact_tokens_needs_the_length_announced(tiny, fit, tokens) -> None:
    model = tiny("tiny/llama")
    method = kqsvd(budget=0.5, compress_prefill=True, window=8)
    cache = method.new_cache(model, fit(method, "tiny/llama"))
    with pytest.raises(kvgauge.UserError, match="expect"):
        model(tokens(1, 32), past_key_values=cache)
    announced = method.new_cache(model, fit(method, "tiny/llama"), context_length=32)
    model(tokens(1, 32), past_key_values=announced)
    assert announced.compressed


def test_looking_into_and_cropping_an_unfinished_context_are_refused() -> None:
    _, pairs = layer_of(3, 5)
    cache = KVCache([StreamingLatentLayer(lambda tokens: pairs)])
    layer, states = cache.layers[0], torch.randn(1, 2, 6, 8)
    layer.update(states, states)
    layer.attend(torch.randn(1, 4, 6, 8), mask=Mask.of(None), scaling=1.0, position_ids=None)
    with pytest.raises(kvgauge.UserError, match="compress"):
        layer.dense()
    with pytest.raises(kvgauge.UserError, match="compress"):
        layer.crop(-1)
    layer.compress()
    layer.crop(-2)
    assert layer.get_seq_length() == 4
    assert layer.dense()[0].shape[2] == 4


@EXACT
def test_what_is_decoded_is_stored_as_if_it_had_been_in_the_context(exact: dict[str, int]) -> None:
    keys, values = (torch.randn(2, 2, 96, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    (whole, _), (grown, _) = layer_of(4, 6, **exact), layer_of(4, 6, **exact)
    for cache, tokens in ((whole, 96), (grown, 60)):
        cache.own[0].update(keys[:, :, :tokens], values[:, :, :tokens])
        cache.compress()
    for token in range(60, 96):
        grown.own[0].update(keys[:, :, token : token + 1], values[:, :, token : token + 1])
    grown.compress_again()
    assert grown.nbytes_by_part() == whole.nbytes_by_part()
    for mine, theirs in zip(grown.own[0].dense(), whole.own[0].dense(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
