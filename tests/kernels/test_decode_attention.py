"""The compiled attention of decode steps against the dense formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvgauge.kernels.cpu import operators
from kvgauge.kernels.cpu.decode_attention import (
    LONG_RUN_BYTES,
    MOST_GROUPED,
    SHORT_BLOCK,
    counted_decode_attention,
    decode_attention,
)


def side_by_side(batch: int, heads: int, tokens: int, rank: int, dtype: torch.dtype, spare: int = 5) -> Tensor:
    """Random rows (batch, heads, tokens, rank), the tokens of a dimension side by side, with spare capacity behind."""
    return torch.randn(batch, heads, rank, tokens + spare).to(dtype)[..., :tokens].mT


def dense(query: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = query.double() @ keys.double().mT * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    return scores.softmax(dim=-1) @ values.double(), scores.logsumexp(dim=-1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 33, SHORT_BLOCK, 2 * SHORT_BLOCK + 1, 6 * LONG_RUN_BYTES + 3])
@pytest.mark.parametrize("group", range(1, MOST_GROUPED + 1))
def test_output_and_normalisers_are_those_of_the_dense_formula(group, tokens, dtype, masked):
    torch.manual_seed(group * tokens)
    rank_k, rank_v = 5 + group, 19 - group
    query = torch.randn(2, 3, group, rank_k).to(dtype)
    keys, values = side_by_side(2, 3, tokens, rank_k, dtype), side_by_side(2, 3, tokens, rank_v, dtype)
    mask = None
    if masked:
        mask = torch.rand(2, tokens) > 0.4
        mask[0, : tokens // 2], mask[:, -1] = False, True
    output, lse = decode_attention(query, keys, values, 0.3, mask)
    expected, normalisers = dense(query, keys, values, 0.3, mask)
    assert output.dtype == dtype and output.shape == (2, 3, group, rank_v)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(output.double(), expected, **close)
    torch.testing.assert_close(lse.double(), normalisers, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("counts", [None, "ones", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 33, 2 * SHORT_BLOCK + 1, 6 * LONG_RUN_BYTES + 3])
@pytest.mark.parametrize("group", [1, 3, 4, MOST_GROUPED])
def test_entries_count_as_often_as_they_stand_for_tokens_and_receive_the_column_sums(group, tokens, dtype, counts):
    torch.manual_seed(group * tokens)
    query = torch.randn(2, 3, group, 9).to(dtype)
    keys, values = side_by_side(2, 3, tokens, 9, dtype), side_by_side(2, 3, tokens, 7, dtype)
    often = None
    if counts is not None:
        often = torch.randint(0, 2 if counts == "ones" else 9, (2, tokens), dtype=torch.int32)
        often[:, -1] = 1
    weights = query.double() @ keys.double().mT * 0.3
    if often is not None:
        weights += often.double().log()[:, None, None]
    expected_lse, weights = weights.logsumexp(dim=-1), weights.softmax(dim=-1)
    output, received = counted_decode_attention(query, keys, values, 0.3, often)
    assert output.dtype == dtype and received.dtype == torch.float32
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(output.double(), weights @ values.double(), **close)
    torch.testing.assert_close(received.double(), weights.sum(dim=2), rtol=1e-4, atol=1e-7)
    alone, lse = decode_attention(query, keys, values, 0.3, often)
    assert torch.equal(alone, output)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("projected", [(True, False), (False, True), (True, True)])
def test_queries_and_outputs_are_projected_on_the_way(projected, dtype):
    torch.manual_seed(0)
    keys, values = side_by_side(2, 3, 700, 6, dtype), side_by_side(2, 3, 700, 7, dtype)
    asking = torch.randn(3, 16, 6).to(dtype) if projected[0] else None
    expansion = torch.randn(3, 16, 7).to(dtype) if projected[1] else None
    query = torch.randn(2, 3, 2, 16 if projected[0] else 6).to(dtype)
    output, lse = decode_attention(query, keys, values, 0.3, asking=asking, expansion=expansion)
    asked = query.double() if asking is None else query.double() @ asking.double()
    expected, normalisers = dense(asked, keys, values, 0.3, None)
    expected = expected if expansion is None else expected @ expansion.double().mT
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(output.double(), expected, **close)
    torch.testing.assert_close(lse.double(), normalisers, rtol=1e-4, atol=1e-4)


def test_scores_far_apart_neither_overflow_nor_vanish():
    torch.manual_seed(0)
    query, keys = torch.randn(1, 1, 2, 4) * 300, side_by_side(1, 1, 1500, 4, torch.float32)
    values = side_by_side(1, 1, 1500, 4, torch.float32)
    output, lse = decode_attention(query, keys, values, 1.0)
    expected, normalisers = dense(query, keys, values, 1.0, None)
    torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse.double(), normalisers, rtol=1e-5, atol=1e-5)


def test_the_number_of_threads_changes_no_bit():
    torch.manual_seed(0)
    query = torch.randn(2, 3, 3, 16)
    keys, values = side_by_side(2, 3, 3000, 16, torch.float32), side_by_side(2, 3, 3000, 16, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(counted_decode_attention(query, keys, values, 0.25))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("case", ["rows", "double", "mixed", "group", "gradient", "empty"])
def test_what_it_is_not_compiled_for_is_left_to_torch(case):
    dtype = torch.float64 if case == "double" else torch.float32
    query = torch.randn(1, 2, MOST_GROUPED + 1 if case == "group" else 2, 8, dtype=dtype)
    query.requires_grad_(case == "gradient")
    keys, values = (side_by_side(1, 2, 0 if case == "empty" else 20, 8, dtype) for _ in range(2))
    if case == "rows":
        keys = keys.contiguous()
    if case == "mixed":
        values = values.bfloat16()
    assert decode_attention(query, keys, values, 0.3) is None
    assert counted_decode_attention(query, keys, values, 0.3) is None


def test_without_a_compiler_it_does_not_apply(monkeypatch):
    monkeypatch.setattr(operators, "available", lambda: False)
    rows = side_by_side(1, 2, 20, 8, torch.float32)
    assert decode_attention(torch.randn(1, 2, 2, 8), rows, rows, 0.3) is None


def test_the_operator_can_be_traced():
    query, rows = torch.randn(1, 2, 2, 8), side_by_side(1, 2, 20, 8, torch.float32)
    asking, expansion = torch.randn(2, 8, 8), torch.randn(2, 5, 8)
    for counting in (False, True):
        arguments = (query, rows, rows, asking, expansion, 0.3, 2.0, torch.randn(4), None, counting)
        torch.library.opcheck(torch.ops.kvgauge.decode_attention, arguments)
