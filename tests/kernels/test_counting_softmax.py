"""The compiled softmax and its column sums against the dense formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvgauge.attend.cardinalities import HIDDEN
from kvgauge.kernels.cpu.counting_softmax import counting_softmax

BATCH, HEADS, GROUP = 2, 3, 3


def dense(scores: Tensor, bias: Tensor | None, counts: Tensor | None, queries: int) -> tuple[Tensor, Tensor]:
    seen = scores.shape[-1]
    each = scores.double().unflatten(2, (GROUP, queries))
    if bias is not None:
        each = each + bias.double()[:, None, None, None]
    later = torch.arange(seen) > torch.arange(seen - queries, seen)[:, None]
    weights = each.masked_fill(later, -torch.inf).softmax(dim=-1)
    counted = weights if counts is None else weights * counts.double()[:, None, None, :, None]
    return weights.flatten(2, 3), counted.sum(dim=(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(("queries", "seen"), [(1, 1), (1, 40), (7, 7), (50, 333), (300, 1500)])
def test_weights_and_column_sums_are_those_of_the_dense_formula(queries, seen, extras, dtype):
    torch.manual_seed(seen)
    scores = (3 * torch.randn(BATCH, HEADS, GROUP * queries, seen)).to(dtype)
    # Both are parts of larger tensors, as blocks of queries are.
    bias = torch.randint(1, 9, (BATCH, seen + 5)).float().log()[:, :seen] if extras else None
    counts = torch.randint(0, 2, (BATCH, queries + 4)).float()[:, 4:] if extras else None
    sums = torch.ones(BATCH, HEADS, seen + 9)
    weights, expected_sums = dense(scores, bias, counts, queries)
    assert counting_softmax(scores, sums[..., :seen], bias, counts, queries)
    close = {"rtol": 2e-6, "atol": 1e-9} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 0.0}
    torch.testing.assert_close(scores.double(), weights, **close)
    torch.testing.assert_close(sums[..., :seen].double() - 1, expected_sums, rtol=1e-5, atol=2e-5)
    assert bool((sums[..., seen:] == 1).all())


def test_hidden_entries_get_nothing_and_a_row_of_them_stays_a_number():
    scores, sums = torch.randn(1, 1, 2, 40), torch.zeros(1, 1, 40)
    bias = torch.full((1, 40), HIDDEN)
    bias[0, 38] = 0.0
    assert counting_softmax(scores, sums, bias, None, 2)
    assert scores[0, 0, :, 38].tolist() == [1.0, 1.0] and int((scores > 0).sum()) == 2
    scores, sums = torch.randn(1, 1, 1, 40), torch.zeros(1, 1, 40)
    assert counting_softmax(scores, sums, torch.full((1, 40), HIDDEN), torch.zeros(1, 1), 1)
    assert bool(scores.isfinite().all()) and not bool(sums.any())


def test_scores_far_apart_neither_overflow_nor_vanish():
    scores = torch.tensor([[[[-3e4, 80.0, 0.0, 79.0, -8.0]]]])
    expected = scores.double().softmax(dim=-1)
    assert counting_softmax(scores, torch.zeros(1, 1, 5), None, None, 1)
    torch.testing.assert_close(scores.double(), expected, rtol=2e-6, atol=1e-37)


def test_the_result_does_not_depend_on_the_number_of_threads(monkeypatch):
    torch.manual_seed(0)
    scores, results = torch.randn(2, 3, 900, 700), []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        weights, sums = scores.clone(), torch.zeros(2, 3, 700)
        assert counting_softmax(weights, sums, None, None, 300)
        results.append((weights, sums))
    for weights, sums in results[1:]:
        assert torch.equal(weights, results[0][0]) and torch.equal(sums, results[0][1])


def test_it_leaves_what_it_cannot_take():
    def takes(scores: Tensor, sums: Tensor) -> bool:
        return counting_softmax(scores, sums, None, None, 2)

    sums = torch.zeros(1, 1, 4)
    assert takes(torch.randn(1, 1, 2, 4), sums)
    assert not takes(torch.randn(1, 1, 2, 4).double(), sums.double())
    assert not takes(torch.randn(1, 1, 4, 2).mT, sums)
    assert not takes(torch.randn(1, 1, 2, 4, requires_grad=True), sums)
