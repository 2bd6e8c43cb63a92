"""Cardinality-normalised attention and its column sums, against a dense softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvgauge.attend.counted_attention import cardinality_attention, counted_attention

BATCH, HEADS, KV_HEADS, DIM = 2, 6, 2, 8
SCALING = DIM**-0.5


def tensors(
    queries: int, entries: int, dtype: torch.dtype = torch.float64, *, side_by_side: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, keys and values; `side_by_side`: the tokens of a dimension are, as a compiled kernel wants them."""
    torch.manual_seed(queries * 100 + entries)
    query = torch.randn(BATCH, HEADS, queries, DIM, dtype=dtype)
    keys, values = (torch.randn(BATCH, KV_HEADS, entries, DIM, dtype=dtype) for _ in range(2))
    if side_by_side:
        keys, values = keys.mT.contiguous().mT, values.mT.contiguous().mT
    return query, keys, values


def dense(
    query: Tensor, keys: Tensor, values: Tensor, cardinalities: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``o = Σ e^s V / Σ c e^s`` with the values' sums V = c ū, and the column sums of ``c e^s / Σ c e^s``."""
    queries, entries = query.shape[2], keys.shape[2]
    keys, values = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (keys, values))
    scores = query @ keys.mT * SCALING
    last = torch.arange(entries - queries, entries)
    scores = scores.masked_fill(torch.arange(entries) > last[:, None], -torch.inf)
    exponentials = scores.exp()
    counts = cardinalities.to(query.dtype)[:, None, None]
    weights = exponentials / (exponentials * counts).sum(-1, keepdim=True)
    output = weights @ (values * counts.mT)
    shares = weights * counts
    if valid is not None:
        shares = shares * valid[:, None, :, None]
    return output.transpose(1, 2), shares.sum(dim=2).unflatten(1, (KV_HEADS, -1)).sum(dim=2)


@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_bytes", [1, 3000, 2**30])
@pytest.mark.parametrize(("queries", "entries"), [(1, 9), (7, 7), (7, 20)])
def test_output_and_column_sums_are_those_of_a_dense_softmax(
    queries: int, entries: int, block_bytes: int, dtype: torch.dtype, side_by_side: bool
) -> None:
    query, keys, values = tensors(queries, entries, dtype, side_by_side=side_by_side)
    cardinalities = torch.randint(1, 6, (BATCH, entries), dtype=torch.int32)
    output, sums = counted_attention(query, keys, values, cardinalities, SCALING, block_bytes=block_bytes)
    expected, expected_sums = dense(query.double(), keys.double(), values.double(), cardinalities)
    assert output.dtype == dtype and sums.dtype == torch.promote_types(dtype, torch.float32)
    close = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(output.double(), expected, rtol=close, atol=close)
    torch.testing.assert_close(sums.double(), expected_sums, rtol=close, atol=close)
    torch.testing.assert_close(
        sums.sum(-1), torch.full_like(sums[..., 0], queries * HEADS / KV_HEADS), rtol=close, atol=close
    )


@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("queries", "entries"), [(1, 9), (6, 20)])
def test_the_quick_path_gives_the_same_output(
    queries: int, entries: int, dtype: torch.dtype, side_by_side: bool
) -> None:
    query, keys, values = tensors(queries, entries, dtype, side_by_side=side_by_side)
    cardinalities = torch.randint(1, 6, (BATCH, entries), dtype=torch.int32)
    counted, _ = counted_attention(query, keys, values, cardinalities, SCALING)
    torch.testing.assert_close(cardinality_attention(query, keys, values, cardinalities, SCALING), counted)
    plain, _ = counted_attention(query, keys, values, None, SCALING)
    torch.testing.assert_close(cardinality_attention(query, keys, values, None, SCALING), plain)


def test_an_entry_of_cardinality_c_is_c_tokens_with_one_key() -> None:
    query, keys, values = tensors(4, 10)
    cardinalities = torch.ones(BATCH, 10, dtype=torch.int32)
    cardinalities[:, 2] = 3
    merged, sums = counted_attention(query, keys, values, cardinalities, SCALING)
    places = torch.tensor([0, 1, 2, 2, 2, *range(3, 10)])
    apart_values = values[:, :, places].clone()
    noise = torch.randn(BATCH, KV_HEADS, DIM, dtype=values.dtype)
    apart_values[:, :, 2] += noise
    apart_values[:, :, 4] -= noise  # their mean stays
    apart, apart_sums = counted_attention(query, keys[:, :, places], apart_values, None, SCALING)
    torch.testing.assert_close(merged, apart)
    torch.testing.assert_close(sums[..., 2], apart_sums[..., 2:5].sum(-1))


def test_empty_places_and_padding_queries_do_not_count() -> None:
    query, keys, values = tensors(5, 12)
    cardinalities = torch.ones(BATCH, 12, dtype=torch.int32)
    cardinalities[0, :4] = 0
    cardinalities[0, 7:9] = 0  # two padding tokens among the new ones
    valid = torch.ones(BATCH, 5, dtype=torch.bool)
    valid[0, :2] = False
    output, sums = counted_attention(query, keys, values, cardinalities, SCALING, valid)
    kept = torch.tensor([4, 5, 6, 9, 10, 11])
    alone, alone_sums = dense(
        query[:1, :, 2:], keys[:1, :, kept], values[:1, :, kept], torch.ones(1, 6, dtype=torch.int32)
    )
    torch.testing.assert_close(output[:1, 2:], alone, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(sums[:1][..., kept], alone_sums, rtol=1e-6, atol=1e-9)
    assert output.isfinite().all()
    assert sums[0, :, :4].abs().max() == 0


def test_sums_of_half_precision_are_added_in_float32() -> None:
    query, keys, values = tensors(64, 256, torch.bfloat16)
    output, sums = counted_attention(query, keys, values, None, SCALING)
    assert output.dtype == torch.bfloat16
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.sum(-1), torch.full_like(sums[..., 0], 64 * HEADS / KV_HEADS), rtol=1e-4, atol=0)
