"""What facts say of a model is what the model does: shapes and bytes of transformers' own cache, for all layers."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvgauge.architecture.facts import attention_modules, full_nbytes, model_facts, output_weight
from kvgauge.architecture.glimpse import glimpse
from kvgauge.architecture.kinds import Kind
from kvgauge.errors import UserError
from kvgauge.models.zoo import ARCHITECTURES

TOKENS = 100  # more than a window


def cache_nbytes(cache: DynamicCache) -> int:
    """Bytes of keys, values and states."""
    tensors = []
    for layer in cache.layers:
        tensors += [getattr(layer, "keys", None), getattr(layer, "values", None), getattr(layer, "indexer_keys", None)]
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            tensors += states.values()
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shapes_are_those_of_what_is_cached(name, zoo):
    model = zoo(name)
    facts, seen = model_facts(model), glimpse(model, [0])
    for layer in facts.layers:
        assert (layer.index in seen.keys) == (layer.cached_width > 0)
        if layer.index in seen.keys:
            assert seen.keys[layer.index].shape[2:] == (layer.num_key_value_heads, layer.head_dim)
            assert seen.values[layer.index].shape[2:] == (layer.num_key_value_heads, layer.value_head_dim)
    assert len(attention_modules(model)) == facts.num_layers == len(facts.compressed)


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"deepseek_v32"}))
def test_bytes_are_those_of_transformers_own_cache(name, zoo):
    model = zoo(name)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.randint(3, 259, (1, TOKENS), generator=torch.Generator().manual_seed(0)), past_key_values=cache)
    facts = model_facts(model)
    assert full_nbytes(model, TOKENS) == facts.full_nbytes(TOKENS) == cache_nbytes(cache)
    compressible = facts.num_layers * facts.cached_width * 4 * TOKENS
    assert facts.others_nbytes(TOKENS) == facts.full_nbytes(TOKENS) - (compressible if facts.num_layers else 0)


def test_layers_that_may_be_compressed_are_those_that_grow(zoo):
    assert model_facts(zoo("llama")).compressed == (0, 1, 2, 3)
    assert model_facts(zoo("gemma3")).compressed == (1, 3)
    assert model_facts(zoo("jamba")).compressed == (1, 3)
    assert model_facts(zoo("llama4")).compressed == (3,)
    assert [layer.kind for layer in model_facts(zoo("llama4")).layers] == [Kind.CHUNK] * 3 + [Kind.FULL]
    assert [layer.kind for layer in model_facts(zoo("qwen3_next")).layers] == [Kind.LINEAR, Kind.FULL] * 2
    assert {layer.kind for layer in model_facts(zoo("minicpm3")).layers} == {Kind.LATENT}
    assert {layer.kind for layer in model_facts(zoo("deepseek_v32")).layers} == {Kind.SPARSE}
    hybrid = model_facts(zoo("falcon_h1"))
    assert hybrid.compressed == (0, 1, 2, 3) and hybrid.others_nbytes(10) == sum(
        layer.state_nbytes for layer in hybrid.layers
    )


def test_a_quantised_reference_has_16_bit_windows_and_states_as_they_are(zoo):
    facts = model_facts(zoo("gemma3"))
    assert facts.full_nbytes(50, bits=16) == facts.full_nbytes(50) // 2
    facts = model_facts(zoo("jamba"))
    states = sum(layer.state_nbytes for layer in facts.layers)
    assert facts.full_nbytes(50, bits=16) == (facts.full_nbytes(50) - states) // 2 + states


def test_scores_and_shared_layers_are_known(zoo):
    assert {layer.softcap for layer in model_facts(zoo("gemma2")).layers} == {5.0}
    assert {layer.softcap for layer in model_facts(zoo("gemma3")).layers} == {None}
    assert all(layer.sink_logits for layer in model_facts(zoo("gpt_oss")).layers)
    assert not any(layer.sink_logits for layer in model_facts(zoo("llama")).layers)
    layers = model_facts(zoo("gemma3n")).layers
    assert [layer.kind for layer in layers[-2:]] == [Kind.SHARED] * 2
    assert [layer.source for layer in layers] == [None] * 4 + [2, 3]
    assert [layer.readers for layer in layers] == [(), (), (4,), (5,), (), ()]


def test_uneven_shapes_are_described(zoo):
    facts = model_facts(zoo("mimo_v2_flash"))
    assert not facts.uniform and facts.value_head_dim == 24
    facts.check("mean_merge")
    with pytest.raises(UserError, match=r"does not serve MiMoV2FlashForCausalLM: it has values of 24 dimensions"):
        facts.check("mean_merge", uneven=False)
    model_facts(zoo("gemma4")).check("mean_merge", uneven=False)


def test_a_model_of_windows_has_nothing_to_compress(zoo):
    facts = model_facts(zoo("mistral-window"))
    assert facts.num_layers == 0 and facts.full_nbytes(2000) == facts.full_nbytes(63)
    with pytest.raises(UserError, match="every layer has a window of 64 tokens"):
        facts.check("xkv")
    with pytest.raises(UserError, match="its layers are sparse"):
        model_facts(zoo("deepseek_v32")).check("xkv")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "lfm2", "phi", "deepseek_v3"])
def test_output_weights_make_the_modules_output(name, zoo):
    model = zoo(name)
    module, weight = attention_modules(model)[0], output_weight(model, 0)
    heads = torch.randn(5, weight.shape[0], weight.shape[1])
    found = [child for label, child in module.named_children() if label in ("o_proj", "c_proj", "out_proj", "dense")]
    bias = getattr(found[0], "bias", None)
    expected = found[0](heads.flatten(1)) - (0 if bias is None else bias)
    torch.testing.assert_close(torch.einsum("thd,hdo->to", heads, weight), expected, atol=1e-5, rtol=1e-4)


def test_a_model_without_such_a_projection_says_so(zoo):
    with pytest.raises(UserError, match="JetMoeAttention has no output projection"):
        output_weight(zoo("jetmoe"), 0)
