"""Streaming moments against the dense formula, and what they refuse."""

from __future__ import annotations

import pytest
import torch

import kvgauge
from kvgauge.calibration.moments import SEQUENCE_TOKENS, first_sequences
from kvgauge.errors import UserError
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
