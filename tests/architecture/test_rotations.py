"""The probe: keys that the model's own code made at two positions are turned into each other, layer by layer."""

from __future__ import annotations

import pytest
import torch

from kvgauge.architecture.facts import attention_modules, model_facts
from kvgauge.architecture.frequencies import rotary_frequencies
from kvgauge.architecture.glimpse import glimpse
from kvgauge.architecture.kinds import Kind
from kvgauge.architecture.planes import PlaneRotation, from_planes, to_planes
from kvgauge.architecture.rotary import Rotary
from kvgauge.architecture.rotations import layer_rotation, layer_rotations
from kvgauge.errors import UserError
from kvgauge.models.zoo import ARCHITECTURES

WITHOUT_ROTATION = {"gpt2", "gpt_bigcode", "opt", "gptj", "bloom", "mpt"}
NOTHING_TO_COMPRESS = {"mistral-window", "phi3-window", "starcoder2", "recurrent_gemma", "deepseek_v32"}
BY_LENGTH = {"llama-dynamic", "phi3-longrope"}
ROTATING = sorted(set(ARCHITECTURES) - WITHOUT_ROTATION - NOTHING_TO_COMPRESS - BY_LENGTH)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ROTATING)
def test_a_key_is_turned_as_the_model_turns_it(name, zoo):
    model = zoo(name)
    facts, seen = model_facts(model), glimpse(model, [3, 40, 700])
    for layer, index in enumerate(facts.compressed):
        states = (seen.keys if facts.latent is None else seen.values)[index].transpose(1, 2)  # (3, N, tokens, d)
        rotary, places = Rotary(model, layer), torch.full((1, states.shape[2]), 37)
        assert error(rotary.shift(states[:1], places), states[1:2]) <= 3e-6
        assert error(rotary.shift(states[:1], torch.full_like(places, 697)), states[2:]) <= 3e-4  # float32 angles
        at = torch.full_like(places, 40)
        pre = rotary.unrotate(states[1:2], at)
        assert error(rotary.rotate(pre, at), states[1:2]) <= 3e-6
        assert error(pre, rotary.unrotate(states[:1], torch.full_like(places, 3))) <= 3e-6


@pytest.mark.parametrize("name", ["cohere", "ernie4_5", "glm4", "phi", "smollm3", "hunyuan", "nanochat", "gemma4"])
def test_the_convention_of_llama_is_told_apart(name, zoo):
    model = zoo(name)
    layer = model_facts(model).compressed[-1]
    seen = glimpse(model, [3, 40])
    states = seen.keys[layer].transpose(1, 2)
    llama = PlaneRotation(1.0 / 10000 ** (torch.arange(0, 1, 2 / states.shape[-1])))
    turned = from_planes(to_planes(states[:1]) * llama.phases(torch.tensor(37)))
    assert error(turned, states[1:]) >= 0.05


@pytest.mark.parametrize("name", ["ernie4_5", "glm4", "hunyuan", "smollm3", "qwen3_next", "gemma4"])
def test_in_its_frame_every_rotation_is_one_of_halves(name, zoo):
    model = zoo(name)
    facts, seen = model_facts(model), glimpse(model, [3, 40])
    for layer, index in enumerate(facts.compressed):
        keys, queries = seen.keys[index].transpose(1, 2), torch.randn(1, facts.num_key_value_heads, 4, facts.head_dim)
        rotary, framed = Rotary(model, layer), Rotary(model, layer, framed=True)
        frame, places = rotary.frame, torch.full((1, 4), 37)
        inside = frame.keys(keys[:1])
        assert error(frame.model_keys(framed.shift(inside, places)), keys[1:]) <= 3e-6
        planes = to_planes(inside) * PlaneRotation(rotary_frequencies(model, layer)).phases(places)[:, None]
        assert error(frame.model_keys(from_planes(planes)), keys[1:]) <= 3e-6
        scores = frame.queries(queries) @ frame.keys(keys[1:]).mT
        torch.testing.assert_close(scores, queries @ keys[1:].mT, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(frame.model_queries(frame.queries(queries)), queries, atol=1e-5, rtol=1e-5)
        at = torch.full((1, 4), 40)
        pre = rotary.unrotate(keys[1:], at), rotary.unrotate(queries, at, queries=True)
        torch.testing.assert_close(pre[1] @ pre[0].mT, queries @ keys[1:].mT, atol=1e-4, rtol=1e-4)


def test_facts_of_rotations(zoo):
    def of(name: str, layer: int = 0):
        found = layer_rotations(zoo(name))[layer]
        return found.rotary_dim, found.interleaved, found.normed_after, found.source.rpartition(".")[2], found.rope_type

    assert of("llama") == (16, False, False, "inv_freq", "default")
    assert of("llama-yarn") == (16, False, False, "inv_freq", "yarn")
    assert of("cohere") == (16, True, False, "inv_freq", "default")
    assert of("glm4") == (8, True, False, "inv_freq", "default")
    assert of("stablelm") == (4, False, False, "inv_freq", "default")
    assert of("hunyuan") == (16, False, True, "inv_freq", "default")
    assert of("gemma3") == (16, False, False, "full_attention_inv_freq", "default")
    assert of("gemma4") == (8, False, False, "full_attention_inv_freq", "proportional")
    assert of("smollm3", 3) == of("jamba") == (0, False, False, "", "")


@pytest.mark.parametrize("name", sorted(WITHOUT_ROTATION))
def test_positions_that_are_no_rotation_are_refused(name, zoo):
    reason = "takes no positions" if name in ("bloom", "mpt") else "adds positions to its hidden states"
    with pytest.raises(UserError, match="turns its keys is not known" if name == "gptj" else reason):
        Rotary(zoo(name))


def test_layers_that_differ_need_a_layer(zoo):
    with pytest.raises(UserError, match=r"rotate differently \(halves, default at inv_freq; no rotation\)"):
        Rotary(zoo("smollm3"))
    assert layer_rotation(zoo("smollm3"), 3).rotary_dim == 0
    assert layer_rotation(zoo("gemma3")).source.endswith("full_attention_inv_freq")  # all that may be compressed


def test_twins_have_the_same_keys_before_the_rotation_and_in_the_frame(zoo):
    """Rows of W_Q and W_K permuted from neighbours to halves make ERNIE 4.5 a Llama."""
    ernie, llama = zoo("ernie4_5"), zoo("llama")
    order = layer_rotation(ernie).frame.order
    hidden = torch.randn(1, 30, 64)
    positions = torch.arange(30)[None]
    module, facts = attention_modules(ernie)[0], model_facts(ernie)
    assert {layer.kind for layer in facts.layers} == {Kind.FULL}
    plain = (hidden @ module.k_proj.weight.T).unflatten(-1, (2, 16)).transpose(1, 2)
    permuted = module.k_proj.weight.unflatten(0, (2, 16))[:, order].flatten(0, 1)
    twin = (hidden @ permuted.T).unflatten(-1, (2, 16)).transpose(1, 2)
    ours, theirs = Rotary(ernie), Rotary(llama)
    keys = ours.rotate(plain[..., order], positions)
    torch.testing.assert_close(ours.frame.keys(keys), theirs.rotate(twin, positions), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours.unrotate(keys, positions), twin, atol=1e-5, rtol=1e-5)
