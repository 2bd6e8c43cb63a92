"""The Hessians against autograd, the merged key against a numerical minimiser, and the guards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor

from kvgauge.methods.merging.merge_keys import (
    hessian_diagonal,
    hessian_off_diagonal,
    hessian_row_sums,
    key_weights,
    segment_sums,
    value_deltas,
)

TOKENS, DIM = 16, 4


@pytest.fixture
def case() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {
        "query": torch.randn(DIM, dtype=torch.float64),
        "keys": torch.randn(TOKENS, DIM, dtype=torch.float64),
        "values": torch.randn(TOKENS, DIM, dtype=torch.float64),
        "gradient": torch.randn(DIM, dtype=torch.float64),
    }


def loss(case: dict[str, Tensor], keys: Tensor) -> Tensor:
    """A loss whose gradient in the attention output is ``case["gradient"]``."""
    return torch.softmax(keys @ case["query"], dim=0) @ case["values"] @ case["gradient"]


def exact_shares_and_deltas(case: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    shares = torch.softmax(case["keys"] @ case["query"], dim=0)
    return shares, (case["values"] - shares @ case["values"]) @ case["gradient"]


def test_the_hessian_is_the_second_derivative_of_the_output(case: dict[str, Tensor]) -> None:
    exact = torch.autograd.functional.hessian(lambda keys: loss(case, keys), case["keys"])
    shares, deltas = exact_shares_and_deltas(case)
    along = torch.outer(case["query"], case["query"])  # the scores depend on a key through the query alone
    for i in range(TOKENS):
        torch.testing.assert_close(exact[i, :, i], hessian_diagonal(shares[i], deltas[i]) * along)
        for j in range(TOKENS):
            if i != j:
                off = hessian_off_diagonal(shares[i], shares[j], deltas[i], deltas[j])
                torch.testing.assert_close(exact[i, :, j], off * along)


def minimiser(hessian: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Numerical minimum of ``Σ_ij h_ij ⟨k − k_i, k − k_j⟩``."""

    def form(key: np.ndarray) -> float:
        away = key - keys
        return float((hessian * (away @ away.T)).sum())

    return np.asarray(optimize.minimize(form, keys.mean(axis=0), method="BFGS", options={"gtol": 1e-10}).x)


@pytest.mark.parametrize("together", [2, 3, 5])
def test_the_merged_key_minimises_the_quadratic_form(case: dict[str, Tensor], together: int) -> None:
    shares, _ = exact_shares_and_deltas(case)
    deltas = value_deltas(shares[None, None], case["values"][None, None])[0, 0]
    segments = torch.tensor([[*([0] * together), *range(1, TOKENS - together + 1)]])
    count = TOKENS - together + 1
    diagonal = hessian_diagonal(shares, deltas)
    row_sums = hessian_row_sums(diagonal[None, None], shares[None, None], deltas[None, None], segments, count)
    sizes = torch.bincount(segments[0], minlength=count)[None]
    ones = torch.ones(1, TOKENS, dtype=torch.int32)
    weights, guarded = key_weights(row_sums.unsqueeze(-1), shares[None, None], ones, segments, sizes)
    assert not guarded.any()
    merged = segment_sums(case["keys"][None, None] * weights, segments, count)[0, 0]
    hessian = hessian_off_diagonal(shares[:, None], shares[None], deltas[:, None], deltas[None])
    hessian = torch.where(torch.eye(TOKENS, dtype=torch.bool), diagonal[:, None], hessian)[:together, :together]
    expected = minimiser(hessian.numpy(), case["keys"][:together].numpy())
    np.testing.assert_allclose(merged[0].numpy(), expected, atol=1e-6)
    torch.testing.assert_close(merged[1:], case["keys"][together:], rtol=0, atol=0)
    if together == 2:
        (h11, h22), h12 = diagonal[:2], hessian[0, 1]
        paper = ((h11 + h12) * case["keys"][0] + (h22 + h12) * case["keys"][1]) / (h11 + 2 * h12 + h22)
        torch.testing.assert_close(merged[0], paper)


def test_deltas_are_the_distances_to_the_output(case: dict[str, Tensor]) -> None:
    shares, _ = exact_shares_and_deltas(case)
    deltas = value_deltas(5.0 * shares[None, None], case["values"][None, None])[0, 0]
    torch.testing.assert_close(deltas, (case["values"] - shares @ case["values"]).abs().sum(-1))


@pytest.mark.parametrize(
    ("row_sums", "why"),
    [
        ([1.0, -1.0], "zero"),
        ([1.0, -1.0 + 1e-6], "near zero"),
        ([-1.0, -2.0], "negative"),
        ([float("nan"), 1.0], "not a number"),
        ([0.0, 0.0], "nothing"),
    ],
)
def test_unusable_denominators_fall_back_to_the_attention(row_sums: list[float], why: str) -> None:
    segments, sizes = torch.tensor([[0, 0, 1]]), torch.tensor([[2, 1]])
    rows = torch.tensor([[[*row_sums, -7.0]]]).unsqueeze(-1)
    shares = torch.tensor([[[0.1, 0.3, 0.5]]])
    cardinalities = torch.tensor([[2, 1, 1]])
    weights, guarded = key_weights(rows, shares, cardinalities, segments, sizes)
    torch.testing.assert_close(weights.flatten(), torch.tensor([0.25, 0.75, 1.0]))
    assert guarded.tolist() == [[[True, False]]], why
    weights, _ = key_weights(rows, torch.zeros_like(shares), cardinalities, segments, sizes)
    torch.testing.assert_close(weights.flatten(), torch.tensor([2 / 3, 1 / 3, 1.0]))


def test_usable_denominators_are_not_guarded() -> None:
    rows = torch.tensor([[[3.0, 1.0, 2.0]]]).unsqueeze(-1)
    shares = torch.tensor([[[0.1, 0.3, 0.5]]])
    segments, sizes = torch.tensor([[0, 0, 0]]), torch.tensor([[3]])
    weights, guarded = key_weights(rows, shares, torch.ones(1, 3, dtype=torch.int32), segments, sizes)
    torch.testing.assert_close(weights.flatten(), torch.tensor([3.0, 1.0, 2.0]) / 6.0)
    assert not guarded.any()
