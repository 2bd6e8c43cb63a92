"""Selective Reconstruction: landmarks, which chunks are chosen, and attention to exactly those."""

from __future__ import annotations

import pytest
import torch

import kvgauge
from kvgauge.attend.mask import CAUSAL
from kvgauge.methods.across_layers import selection
from kvgauge.methods.across_layers.selection import ChunkSelection
from kvgauge.store.rows import BlockwiseRows


def test_landmarks_are_means_aligned_at_the_end():
    keys = torch.arange(10.0).view(1, 1, 10, 1)
    landmarks = ChunkSelection(4, 8).landmarks(keys, None)
    assert landmarks.flatten().tolist() == [0.5, 3.5, 7.5]  # 0-1, 2-5, 6-9
    valid = torch.tensor([[False] * 3 + [True] * 7])
    assert ChunkSelection(4, 8).landmarks(keys, valid).flatten().tolist() == [0.0, 4.0, 7.5]


def test_the_first_chunk_and_the_best_are_chosen():
    selection = ChunkSelection(4, 8)
    landmarks = torch.zeros(1, 1, 5, 2)
    landmarks[0, 0, 3] = torch.tensor([9.0, 0.0])
    query = torch.tensor([[[[1.0, 0.0]]]])
    assert sorted(selection.choose(query, landmarks, None, 18, 1.0).flatten().tolist()) == [-2, 10]
    padded = selection.choose(query, landmarks, torch.tensor([[7]]), 18, 1.0)
    assert sorted(padded.flatten().tolist()) == [6, 10]  # columns 6-9 hold the first token


def decoded(model, method, ids, step, mask=None):
    cache = method.new_cache(model)
    extra = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    with torch.no_grad():
        model(ids, past_key_values=cache, **extra)
        cache.compress()
        if mask is not None:
            longer = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            extra = {"attention_mask": longer, "position_ids": (longer.cumsum(1) - 1)[:, -1:]}
        return model(step, past_key_values=cache, **extra).logits, cache


@pytest.mark.parametrize("rope", ["pre", "post"])
def test_a_budget_of_all_chunks_but_none_left_out_changes_nothing(rope, tiny, tokens):
    model, ids, step = tiny("tiny/llama"), tokens(1, 90), tokens(1, 1, seed=2)
    plain = kvgauge.build_method("xkv", rank=20, rope=rope)
    chosen = kvgauge.build_method("xkv", rank=20, rope=rope, sr={"chunk": 8, "budget": 96})
    assert torch.equal(decoded(model, plain, ids, step)[0], decoded(model, chosen, ids, step)[0])


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("context", [88, 90])
def test_it_attends_to_the_chosen_tokens_alone(rope, context, tiny, tokens):
    """One chunk is left out of each head's softmax: compare with explicit attention to the approximated keys."""
    model, ids = tiny("tiny/llama"), tokens(1, context)
    method = kvgauge.build_method("xkv", rank=60, rope=rope, sr={"chunk": 8, "budget": 32})
    cache = decoded(model, method, ids, tokens(1, 1))[1]
    cache.crop(-1)
    layer = cache.layers[2]
    keys, values = layer.dense()
    query = torch.randn(1, 4, 1, 16)
    starts = ChunkSelection(8, 32).choose(query, layer.landmarks.view(), None, context, 0.25)
    columns = starts.unsqueeze(-1) + torch.arange(8)
    mask = torch.zeros(1, 2, context, dtype=torch.bool)
    for head in range(2):
        mask[0, head, columns[0, head].flatten().clamp_min(0)] = True
        assert int(mask[0, head].sum()) in (32, 32 - (-context) % 8)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask.repeat_interleave(2, dim=1)[:, :, None], scale=0.25, enable_gqa=True
    )
    actual = layer.attend_compressed(query, CAUSAL, 0.25)
    torch.testing.assert_close(actual, expected.transpose(1, 2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_chosen_chunks_of_packed_bases_are_rebuilt_alone_and_sinks_are_always_seen(
    rope, bits, compiled, tiny, tokens, monkeypatch
):
    model, ids, context = tiny("tiny/llama"), tokens(2, 90), 90 - 4
    xkv = {"method": "xkv", "rank": 60, "rope": rope, "sinks": 4, "sr": {"chunk": 8, "budget": 32}}
    method = kvgauge.build_method("compose", compose=[xkv, {"bits": bits}], budget=None)
    cache = decoded(model, method, ids, tokens(2, 1))[1]
    cache.crop(-1)
    layer = cache.layers[2]
    keys, values = layer.dense()
    query = torch.randn(2, 4, 1, 16)
    if compiled:
        monkeypatch.setattr(BlockwiseRows, "block", lambda *given: pytest.fail("the basis was dequantised"))
        monkeypatch.setattr(type(layer.landmarks), "dense", lambda self: self.stored.view().float())
        gathered = []
        gather = selection.gather_rows
        monkeypatch.setattr(selection, "gather_rows", lambda *a: gathered.append(gather(*a)) or gathered[-1])
    else:
        monkeypatch.setattr(selection, "gather_rows", lambda *given: None)
    actual = layer.attend_compressed(query, CAUSAL, 0.25)
    monkeypatch.undo()
    assert not compiled or (len(gathered) == 2 and all(one is not None for one in gathered))
    starts = ChunkSelection(8, 32).choose(query, layer.landmarks.dense(), None, context, 0.25)
    columns = (starts.unsqueeze(-1) + torch.arange(8)).flatten(2)
    mask = torch.zeros(2, 2, context + 4, dtype=torch.bool)
    mask[:, :, :4] = True
    for sequence in range(2):
        for head in range(2):
            chosen = columns[sequence, head]
            mask[sequence, head, 4 + chosen[chosen >= 0]] = True
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask.repeat_interleave(2, dim=1)[:, :, None], scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(actual, expected.transpose(1, 2), atol=2e-4, rtol=1e-3)


def test_padded_batches_give_the_answers_of_one_by_one(tiny, tokens):
    model, step = tiny("tiny/llama"), tokens(1, 1, seed=5)
    long, short = tokens(1, 90, seed=3), tokens(1, 71, seed=4)
    method = kvgauge.build_method("xkv", budget=0.6, sr={"chunk": 8, "budget": 40})
    batch = torch.cat([long, torch.cat([torch.zeros(1, 19, dtype=torch.long), short], dim=1)])
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[1, :19] = 0
    together = decoded(model, method, batch, step.expand(2, -1), mask)[0]
    for row, context in enumerate((long, short)):
        alone = decoded(model, method, context, step)[0][0]
        assert float((together[row] - alone).norm() / alone.norm()) < 1e-4
