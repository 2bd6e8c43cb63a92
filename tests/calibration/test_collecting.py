"""Streaming moments against the dense formula, and what they refuse."""

from __future__ import annotations

import pytest
import torch

import kvgauge
from kvgauge.calibration.moments import SEQUENCE_TOKENS, first_sequences
from kvgauge.errors import UserError
from kvgauge.layers.building import exact_cache
from kvgauge.measure.fidelity import observe
from kvgauge.models.loading import load_model

ARCHITECTURES = ("tiny/llama", "tiny/mistral", "tiny/qwen2", "tiny/qwen3")


def pre_rope(model, ids):
    """Keys and queries before the rotation, per layer, taken where the model computes them."""
    seen = []
    for layer in model.model.layers:
        attention = layer.self_attn
        key = getattr(attention, "k_norm", attention.k_proj)
        query = getattr(attention, "q_norm", attention.q_proj)
        pair = {}
        seen.append((pair, attention.head_dim))
        key.register_forward_hook(lambda _m, _i, out, pair=pair: pair.update(k=out))
        query.register_forward_hook(lambda _m, _i, out, pair=pair: pair.update(q=out))
    with torch.no_grad():
        model(ids)
    return [
        {name: out.reshape(1, ids.shape[1], -1, dim).transpose(1, 2) for name, out in pair.items()}
        for pair, dim in seen
    ]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_moments_are_the_dense_sums(name, tokens):
    model, _ = load_model(name)  # a copy of its own: hooks stay on it
    ids = tokens(1, 70, seed=21)
    moments = kvgauge.collect(model, [ids])
    before = pre_rope(model, ids)
    for seen in observe(model, ids):
        heads = seen.keys.shape[1]
        states = {"k_post": seen.keys, "q_post": seen.queries, "v": seen.values}
        states |= {"k_pre": before[seen.layer]["k"], "q_pre": before[seen.layer]["q"]}
        for label, rows in states.items():
            stacked = rows[0].double().unflatten(0, (heads, -1)).flatten(1, 2)
            expected = stacked.mT @ stacked
            assert moments.tensors[label].dtype == torch.float64
            torch.testing.assert_close(moments.tensors[label][seen.layer], expected, rtol=1e-5, atol=1e-4)


def test_moments_add_up_over_batches_and_shards(tiny, tokens):
    model, ids = tiny("tiny/llama"), tokens(4, 50, seed=22)
    whole = kvgauge.collect(model, [ids])
    stream = kvgauge.collect(model, ids)  # sequence by sequence
    shards = kvgauge.collect(model, [ids[:1]]) + kvgauge.collect(model, [ids[1:]])
    for other in (stream, shards):
        assert other.tokens == whole.tokens == 200
        assert other.sequence_length == 50
        for label, tensor in whole.tensors.items():
            torch.testing.assert_close(other.tensors[label], tensor, rtol=1e-6, atol=1e-6)


def test_moments_of_different_models_do_not_add(moments):
    with pytest.raises(UserError, match="different models"):
        moments("tiny/llama") + moments("tiny/qwen2")


def test_moments_survive_the_disk(moments, tmp_path):
    moments("tiny/llama").save(tmp_path / "m.safetensors")
    again = kvgauge.Moments.load(tmp_path / "m.safetensors")
    assert again.metadata == moments("tiny/llama").metadata
    assert torch.equal(again.values(), moments("tiny/llama").values())
    assert torch.equal(again.held_out, moments("tiny/llama").held_out)
    assert set(again.tensors) == set(moments("tiny/llama").tensors)


def test_no_tokens_too_many_tokens_and_nan(tiny, tokens):
    model = tiny("tiny/llama")
    with pytest.raises(UserError, match="no calibration tokens"):
        kvgauge.collect(model, [])
    with pytest.raises(UserError, match="8192 positions"):
        kvgauge.collect(model, [torch.zeros(1, 8193, dtype=torch.long)])
    broken, _ = load_model("tiny/llama")
    broken.model.layers[2].self_attn.v_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"layer 2 \(v\) are not finite"):
        kvgauge.collect(broken, [tokens(1, 20)])


def test_factors_on_the_scores_are_those_of_the_model(attached, tokens):
    for name, factor in (("llama", 0.25), ("granite", 0.2), ("opt", 1.0)):  # OPT multiplies its queries
        moments = kvgauge.collect(attached(name), [tokens(1, 20)])
        assert moments.scalings().tolist() == [factor] * 4


def test_layers_that_others_read_are_observed_once(attached, tokens):
    model, ids = attached("gemma3n"), tokens(1, 90, seed=3)
    moments = kvgauge.collect(model, [ids])
    for seen, value in zip(observe(model, ids), moments.values(), strict=True):
        rows = seen.values[0].double()
        torch.testing.assert_close(rows.mT @ rows, value, rtol=1e-5, atol=1e-5)
    expected = exact_cache(model)
    with torch.no_grad():
        model(ids, past_key_values=expected)
    for seen in observe(model, ids):
        torch.testing.assert_close(seen.keys, expected.dense(seen.layer)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama-dynamic", "phi3-longrope", "smollm3"])
def test_what_a_model_has_is_collected(name, attached, tokens):
    """Of GPT-2, which rotates nothing, there are no moments before a rotation; nothing else is lost by it."""
    moments = kvgauge.collect(attached(name), [tokens(1, 150)])
    rotated = {"k_post", "q_post", "v"}
    assert set(moments.tensors) == (rotated if name == "gpt2" else rotated | {"k_pre", "q_pre"})


def test_a_few_sequences_stay_with_the_moments(tiny, tokens, tmp_path):
    model = tiny("tiny/llama")
    first, second = tokens(2, 40, seed=1), tokens(1, 30, seed=2)
    together = kvgauge.collect(model, [first]) + kvgauge.collect(model, [second])
    together.save(tmp_path / "moments.safetensors")
    loaded = kvgauge.Moments.load(tmp_path / "moments.safetensors")
    assert [ids.tolist() for ids in loaded.sequences] == [*first.tolist(), *second.tolist()]
    assert set(loaded.tensors) == set(together.tensors)


def test_no_more_sequences_stay_than_fit():
    sequences = [torch.zeros(SEQUENCE_TOKENS // 2 - 1) for _ in range(3)]
    assert len(first_sequences(sequences)) == 2
    assert first_sequences([torch.zeros(2 * SEQUENCE_TOKENS)])[0].numel() == SEQUENCE_TOKENS
