"""The uncompressed cache of any decoder is transformers' own, layer by layer, whatever is done to it."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from kvgauge.architecture.facts import model_facts
from kvgauge.architecture.prompt_length import release_length
from kvgauge.errors import UserError
from kvgauge.layers.building import exact_cache, placed
from kvgauge.layers.cache import KVCache
from kvgauge.layers.exact import ExactLayer
from kvgauge.models.zoo import ARCHITECTURES

OUTSIDE = {"doge", "diffllama", "jetmoe", "gptj", "bloom", "mpt"}  # use cached keys outside of the attention function
IN_MODULES = {"recurrent_gemma"}  # keeps its states in the modules
SERVED = sorted(set(ARCHITECTURES) - OUTSIDE - IN_MODULES - {"deepseek_v32"})
CONTEXT, STEPS, PADDING = 130, 4, 20


def ids(batch: int = 2, tokens: int = CONTEXT + STEPS, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 259, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def read(model, cache, tokens, start=0, mask=None):
    """Logits of `tokens`, the first of them at `start`: the context in passes of 90, what follows one by one."""
    whole = max(0, CONTEXT - start)
    cuts = [*tokens[:, :whole].split(90, dim=1), *tokens[:, whole:].split(1, dim=1)]
    parts, end = [], start
    for part in cuts:
        if not part.shape[1]:
            continue
        end += part.shape[1]
        more = {} if mask is None else {"attention_mask": mask[:, :end]}
        with torch.no_grad():
            parts.append(model(part, past_key_values=cache, **more).logits)
    return torch.cat(parts, dim=1)


def own_cache(model):
    release_length(model)
    return DynamicCache(config=model.config)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", SERVED)
def test_left_padded_batches_in_chunks(name, zoo, attached):
    model, tokens = attached(name), ids()
    mask = torch.ones_like(tokens)
    mask[1, :PADDING] = 0
    cache = exact_cache(model)
    expected = read(zoo(name), own_cache(zoo(name)), tokens, mask=mask)
    found = read(model, cache, tokens[:, :CONTEXT], mask=mask)
    cache.compress()
    facts = model_facts(model)
    assert cache.compressed and cache.compressed_tokens == CONTEXT
    assert cache.nbytes() == 2 * facts.full_nbytes(CONTEXT)
    assert cache.nbytes_by_part().get("others", 0) == 2 * facts.others_nbytes(CONTEXT)
    found = torch.cat([found, read(model, cache, tokens[:, CONTEXT:], CONTEXT, mask=mask)], dim=1)
    assert relative(found[mask.bool()], expected[mask.bool()]) < 1e-5
    if facts.num_layers:
        assert cache.valid is not None and torch.equal(cache.valid, mask.bool())
        keys, values = cache.dense(0)
        heads = facts.num_key_value_heads
        assert keys.shape == (2, heads, CONTEXT + STEPS, facts.head_dim)
        assert values.shape == (2, heads, CONTEXT + STEPS, facts.value_head_dim)


KINDS = ["gemma3", "qwen3_next", "falcon_h1", "lfm2", "llama4", "gemma3n", "mistral-window", "deepseek_v3"]


@pytest.mark.parametrize("name", KINDS)
def test_what_is_done_to_a_batch_is_done_to_all_layers(name, attached):
    model, tokens = attached(name), ids(3)
    rows = torch.tensor([2, 0, 0])
    expected = read(model, exact_cache(model), tokens[rows])
    cache = exact_cache(model)
    read(model, cache, tokens[:, :CONTEXT])
    cache.reorder_cache(rows)
    assert relative(read(model, cache, tokens[rows][:, CONTEXT:], CONTEXT), expected[:, CONTEXT:]) < 1e-5
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes() == 0 and not cache.compressed
    read(model, cache, tokens[:1, :CONTEXT])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([True, False]))
    assert relative(read(model, cache, tokens[:1, CONTEXT:], CONTEXT), expected[1:2, CONTEXT:]) < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_one_prefill_serves_several_caches(name, attached):
    model, tokens = attached(name), ids(1)
    expected = read(model, exact_cache(model), tokens)[:, CONTEXT:]
    source = exact_cache(model)
    read(model, source, tokens[:, :CONTEXT])
    for _ in range(2):
        cache = exact_cache(model)
        cache.adopt(source)
        cache.compress()
        assert relative(read(model, cache, tokens[:, CONTEXT:], CONTEXT), expected) < 1e-5
    assert source.get_seq_length() == CONTEXT
    if model_facts(model).num_layers:
        with pytest.raises(UserError, match="into an empty cache"):
            cache.adopt(source)


@pytest.mark.parametrize("name", ["gemma3", "llama4", "gpt_oss", "llama"])
def test_cropping_before_a_window_is_full(name, attached):
    model, tokens = attached(name), ids(1, 60)
    cache = exact_cache(model)
    expected = read(model, exact_cache(model), tokens)
    read(model, cache, tokens[:, :50])
    cache.crop(-10)
    assert cache.get_seq_length() == 40
    assert relative(read(model, cache, tokens[:, 40:], 40), expected[:, 40:]) < 1e-5


def test_what_has_left_a_window_or_is_in_a_state_cannot_be_cropped(attached):
    for name, message in (("gemma3", "a window of 64 tokens has moved on"), ("jamba", "cannot forget tokens")):
        cache = exact_cache(attached(name))
        read(attached(name), cache, ids(1))
        with pytest.raises(UserError, match=message):
            cache.crop(-1)
        cache.crop(0)
        assert cache.get_seq_length() == CONTEXT + STEPS
        cache.compress()
        assert cache.reversible_tokens() == 0
    cache = exact_cache(attached("gemma3"))
    read(attached("gemma3"), cache, ids(1, 40))
    cache.compress()
    read(attached("gemma3"), cache, ids(1, 1), CONTEXT)  # makes room for more
    assert cache.reversible_tokens() == 22


def test_layers_stand_where_transformers_looks_for_them(attached):
    cache = exact_cache(attached("gemma3"))
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, ExactLayer] * 2
    assert cache.is_sliding == [True, False] * 2 and [layer.index for layer in cache.own] == [0, 1]
    cache = exact_cache(attached("falcon_h1"))
    assert [type(layer) for layer in cache.layers] == [ExactLayer] * 4
    assert [type(layer) for layer in cache.others()] == [LinearAttentionLayer] * 4
    assert [type(layer) for layer in exact_cache(attached("llama")).layers] == [ExactLayer] * 4


def test_windows_free_what_a_long_pass_attended_to(attached):
    model = attached("gemma3")
    cache = exact_cache(model)
    with torch.no_grad():
        model(ids(1, 400), past_key_values=cache)
    cache.compress()
    assert all(layer.keys.untyped_storage().nbytes() == layer.keys.nbytes for layer in cache.others())


def test_compression_by_itself_waits_for_all_readers(attached):
    model = attached("gemma3n")  # the last layer reads the cache of the last one that is compressed
    cache = placed(KVCache([ExactLayer(), ExactLayer()], context_length=CONTEXT), model)
    expected = read(model, exact_cache(model), ids(1))
    assert relative(read(model, cache, ids(1)), expected) < 1e-5
    assert cache.compressed_tokens == CONTEXT


@pytest.mark.parametrize("name", ["ernie4_5", "glm4", "hunyuan", "smollm3", "gemma4", "qwen3_next", "llama"])
def test_caches_that_turn_keys_get_them_in_the_frame(name, attached):
    model, facts = attached(name), model_facts(attached(name))
    expected = read(model, exact_cache(model), ids(1))
    plain = exact_cache(model)
    cache = placed(KVCache([ExactLayer() for _ in facts.compressed]), model, turning=True)
    read(model, plain, ids(1))
    assert relative(read(model, cache, ids(1)), expected) < 1e-5
    for layer in range(facts.num_layers):
        torch.testing.assert_close(cache.dense(layer), plain.dense(layer), atol=1e-4, rtol=1e-4)
    framed = torch.equal(cache.own[0].dense()[0], plain.own[0].dense()[0])
    assert framed == (name in ("smollm3", "gemma4", "llama"))
    other = placed(KVCache([ExactLayer() for _ in facts.compressed]), model, turning=True)
    source = exact_cache(model)
    read(model, source, ids(1)[:, :CONTEXT])
    other.adopt(source)
    other.compress()
    assert relative(read(model, other, ids(1)[:, CONTEXT:], CONTEXT), expected[:, CONTEXT:]) < 1e-5


def test_a_cache_needs_a_layer_for_each_that_may_be_compressed(attached):
    with pytest.raises(UserError, match="4 cache layers for the 2 layers of Gemma3ForCausalLM"):
        placed(KVCache([ExactLayer() for _ in range(4)]), attached("gemma3"))
    with pytest.raises(UserError, match="adds positions to its hidden states"):
        placed(KVCache([ExactLayer() for _ in range(4)]), attached("gpt2"), turning=True)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_next", "falcon_h1", "lfm2", "gemma3n", "mistral-window"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_is_that_of_transformers(name, beams, zoo, attached):
    tokens = ids(2, 90)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "attention_mask": torch.ones_like(tokens)}
    expected = zoo(name).generate(tokens, past_key_values=own_cache(zoo(name)), **options)
    found = attached(name).generate(tokens, past_key_values=exact_cache(attached(name)), **options)
    assert torch.equal(found, expected)
