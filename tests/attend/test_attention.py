"""Attention over segments: one softmax, whatever the runs of tokens are stored as."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvgauge.attend import attention, blocks
from kvgauge.attend.attention import ExactSegment, exact_attention, segmented_attention
from kvgauge.attend.mask import CAUSAL, Counts, Mask, causal_mask
from kvgauge.simulation.machine import SimulatedMachine
from kvgauge.simulation.tensor import simulated


def states(heads: int, tokens: int, seed: int, dimension: int = 8) -> Tensor:
    return torch.randn(2, heads, tokens, dimension, generator=torch.Generator().manual_seed(seed))


def reference(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    groups = query.shape[1] // keys.shape[1]
    keys, values = (rows.repeat_interleave(groups, dim=1) for rows in (keys, values))
    scores = (query @ keys.mT * scaling).masked_fill(~mask, float("-inf"))
    return (torch.softmax(scores, dim=-1) @ values).transpose(1, 2)


@pytest.mark.parametrize("queries", [1, 5, 30])
@pytest.mark.parametrize("cuts", [(30,), (4, 26), (4, 20, 6), (0, 30)])
def test_segments_share_one_softmax(queries: int, cuts: tuple[int, ...]) -> None:
    query, keys, values = states(6, queries, 0), states(3, 30, 1), states(3, 30, 2)
    parts = [
        ExactSegment(one, other) for one, other in zip(keys.split(cuts, dim=2), values.split(cuts, dim=2), strict=True)
    ]
    expected = reference(query, keys, values, causal_mask(queries, 30, query.device), 0.2)
    torch.testing.assert_close(segmented_attention(query, parts, CAUSAL, 0.2), expected)
    torch.testing.assert_close(exact_attention(query, keys, values, CAUSAL, 0.2), expected)


@pytest.mark.parametrize("queries", [1, 7])
def test_masked_tokens_have_no_weight(queries: int) -> None:
    query, keys, values = states(6, queries, 0), states(3, 30, 1), states(3, 30, 2)
    mask = causal_mask(queries, 30, query.device).expand(2, 1, -1, -1).clone()
    mask[1, :, :, :11] = False
    expected = reference(query, keys, values, mask, 0.2)
    parts = [ExactSegment(keys[:, :, :9], values[:, :, :9]), ExactSegment(keys[:, :, 9:], values[:, :, 9:])]
    torch.testing.assert_close(segmented_attention(query, parts, Mask.of(mask), 0.2), expected)
    torch.testing.assert_close(exact_attention(query, keys, values, Mask.of(mask), 0.2), expected)


@pytest.mark.parametrize("side_by_side", [False, True])
def test_counts_of_one_query_weigh_entries_by_their_tokens(side_by_side: bool) -> None:
    query, keys, values = states(6, 1, 0), states(3, 30, 1), states(3, 30, 2)
    counts = torch.randint(0, 4, (2, 1, 1, 30), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
    places = [torch.repeat_interleave(torch.arange(30), row.flatten()) for row in counts]
    seen = [torch.ones(1, 1, 1, len(row), dtype=torch.bool) for row in places]
    expected = torch.cat(
        [
            reference(query[row : row + 1], keys[row : row + 1, :, own], values[row : row + 1, :, own], seen[row], 0.2)
            for row, own in enumerate(places)
        ]
    )
    if side_by_side:
        keys, values = keys.mT.contiguous().mT, values.mT.contiguous().mT
    parts = [ExactSegment(keys[:, :, :9], values[:, :, :9]), ExactSegment(keys[:, :, 9:], values[:, :, 9:])]
    torch.testing.assert_close(segmented_attention(query, parts, Counts(counts), 0.2), expected)
    torch.testing.assert_close(exact_attention(query, keys, values, Counts(counts), 0.2), expected)


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    query, segment = states(6, 30, 0), ExactSegment(states(3, 30, 1), states(3, 30, 2))
    whole = segmented_attention(query, [segment], CAUSAL, 0.2)
    monkeypatch.setattr(blocks, "SCORE_BLOCK_BYTES", 4 * 2 * 6 * 30 * 4)  # four queries
    monkeypatch.setattr(blocks, "LEAST_QUERIES", 1)
    torch.testing.assert_close(segmented_attention(query, [segment], CAUSAL, 0.2), whole)


@pytest.mark.parametrize("heads", [6, 3])
@pytest.mark.parametrize("queries", [2, 7, 29])
def test_a_chunk_needs_no_mask_of_all_tokens(queries: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MASK_BYTES", 4 * 30 * 3)
    monkeypatch.setattr(blocks, "LEAST_QUERIES", 1)
    query, keys, values = states(heads, queries, 0).double(), states(3, 30, 1).double(), states(3, 30, 2, 5).double()
    expected = reference(query, keys, values, causal_mask(queries, 30, query.device), 0.2)
    torch.testing.assert_close(exact_attention(query, keys, values, CAUSAL, 0.2), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("value_dim", "kernel"), [(8, "flash"), (16, "efficient")])
def test_a_chunk_on_a_device_keeps_its_kernel(dtype: torch.dtype, value_dim: int, kernel: str) -> None:
    parts = (states(6, 7, 0), states(3, 30, 1), states(3, 30, 2, value_dim))
    query, keys, values = (part.to(dtype) for part in parts)
    expected = reference(query.float(), keys.float(), values.float(), causal_mask(7, 30, query.device), 0.2)
    with SimulatedMachine() as machine:
        placed = [simulated(part, "cuda:0") for part in (query, keys, values)]
        output = exact_attention(*placed, CAUSAL, 0.2)
        assert machine.tally.attention == {kernel: 1}
    torch.testing.assert_close(output.numbers.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("queries", [1, 7])
def test_a_mask_on_a_device_leaves_the_efficient_kernel(queries: int) -> None:
    query, keys, values = states(6, queries, 0), states(3, 30, 1), states(3, 30, 2)
    mask = causal_mask(queries, 30, query.device).expand(2, 1, -1, -1).clone()
    mask[1, :, :, :11] = False
    with SimulatedMachine() as machine:
        parts = [simulated(part, "cuda:0") for part in (query, keys, values)]
        output = exact_attention(*parts, Mask.of(simulated(mask, "cuda:0")), 0.2)
        assert machine.tally.attention == {"efficient": 1}
    torch.testing.assert_close(output.numbers, reference(query, keys, values, mask, 0.2))


def test_blocks_grow_with_the_memory_of_a_device() -> None:
    with SimulatedMachine(memory=blocks.SHARE * 2**30):
        assert blocks.score_block_bytes(torch.device("cuda:0")) == 2**30
    assert blocks.score_block_bytes(torch.device("cpu")) == blocks.SCORE_BLOCK_BYTES
    assert blocks.queries_at_once(2**40, 2**20) == blocks.LEAST_QUERIES


@pytest.mark.parametrize("causal", [True, False])
def test_modules_say_whether_they_are_causal(causal: bool) -> None:
    module = torch.nn.Identity()
    module.is_causal, module.num_key_value_groups = causal, 2
    query, keys, values = states(6, 7, 0), states(3, 30, 1), states(3, 30, 2)
    seen = causal_mask(7, 30, query.device) if causal else torch.ones(7, 30, dtype=torch.bool)
    output, _ = attention.attention_forward(module, query, keys, values, None, scaling=0.2)
    torch.testing.assert_close(output, reference(query, keys, values, seen, 0.2))


def test_tensors_fall_through_to_scaled_dot_product_attention(tiny, tokens) -> None:
    model, ids = tiny("tiny/llama"), tokens(2, 20)
    ours = model(ids).logits
    model.set_attn_implementation("sdpa")
    try:
        torch.testing.assert_close(model(ids).logits, ours)
    finally:
        attention.install(model)
