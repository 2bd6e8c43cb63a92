"""The closed forms against the dense formulas in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgauge.methods.per_head.factorization import principal_pair, product_pair

DOUBLE = torch.float64


def states(seed, tokens=200, d=12, decay=0.7):
    """Random rows whose directions have very different weights, as keys have."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, d, generator=generator, dtype=DOUBLE)
    mix = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=DOUBLE))[0]
    return rows * decay ** torch.arange(d, dtype=DOUBLE) @ mix


def tail(matrix, rank):
    """Σ of the squared singular values that a rank leaves out: no matrix of that rank comes closer."""
    return float(torch.linalg.svdvals(matrix)[rank:].square().sum())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), rank=st.integers(1, 11), balanced=st.booleans(), groups=st.integers(1, 4))
def test_the_product_pair_is_the_eckart_young_optimum(seed, rank, balanced, groups):
    K, Q = states(seed), states(seed + 1, tokens=200 * groups)
    pair = product_pair(K.T @ K, Q.T @ Q, balanced=balanced)
    A, B = pair.A[:, :rank], pair.B[:, :rank]
    error = float((K @ Q.T - K @ A @ B.T @ Q.T).square().sum())
    assert error == pytest.approx(tail(K @ Q.T, rank), rel=1e-6)
    torch.testing.assert_close(pair.spectrum, torch.linalg.svdvals(K @ Q.T)[:12], rtol=1e-6, atol=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), rank=st.integers(1, 11))
def test_no_other_pair_is_better_on_the_product(seed, rank):
    K, Q = states(seed), states(seed + 1)
    best = product_pair(K.T @ K, Q.T @ Q, balanced=True)

    def error(pair):
        A, B = pair.A[:, :rank], pair.B[:, :rank]
        return float((K @ Q.T - K @ A @ B.T @ Q.T).square().sum())

    for other in (principal_pair(K.T @ K), principal_pair(K.T @ K + Q.T @ Q)):
        assert error(best) <= error(other) * (1 + 1e-9)


def test_the_paper_s_construction_gives_the_same_product():
    K, Q = states(3), states(4)
    rank = 5
    U = torch.linalg.svd(K @ Q.T, full_matrices=False).U[:, :rank]
    A, B = torch.linalg.pinv(K) @ U, K.T @ U
    pair = product_pair(K.T @ K, Q.T @ Q, balanced=False)
    torch.testing.assert_close(pair.A[:, :rank] @ pair.B[:, :rank].T, A @ B.T, rtol=1e-7, atol=1e-9)


def test_balancing_equalises_the_norms_and_keeps_the_product():
    K, Q = states(5), states(6)
    pair = product_pair(K.T @ K, Q.T @ Q, balanced=True)
    latents, queries = K @ pair.A, Q @ pair.B
    torch.testing.assert_close(latents.norm(dim=0), queries.norm(dim=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(latents @ queries.T, K @ Q.T, rtol=1e-7, atol=1e-9)


def test_the_principal_pair_is_the_truncated_svd():
    K = states(7)
    pair = principal_pair(K.T @ K)
    for rank in (1, 4, 11):
        A = pair.A[:, :rank]
        assert float((K - K @ A @ A.T).square().sum()) == pytest.approx(tail(K, rank), rel=1e-8)


def test_a_rank_deficient_moment_is_floored_and_counted():
    K = states(8)
    K = K - (K @ torch.ones(12, 1, dtype=DOUBLE)) / 12  # one direction never occurs
    Q = states(9)
    pair = product_pair(K.T @ K, Q.T @ Q, balanced=True)
    assert pair.floored >= 1
    assert torch.isfinite(pair.A).all() and torch.isfinite(pair.B).all()
    rank = 6
    error = float((K @ Q.T - K @ pair.A[:, :rank] @ pair.B[:, :rank].T @ Q.T).square().sum())
    assert error == pytest.approx(tail(K @ Q.T, rank), rel=1e-6)


def test_layers_and_heads_are_batched():
    K = torch.stack([states(seed) for seed in range(6)]).view(3, 2, 200, 12)
    Q = torch.stack([states(seed + 50) for seed in range(6)]).view(3, 2, 200, 12)
    together = product_pair(K.mT @ K, Q.mT @ Q, balanced=True)
    alone = product_pair(K[1, 1].T @ K[1, 1], Q[1, 1].T @ Q[1, 1], balanced=True)
    product = together.A[1, 1, :, :4] @ together.B[1, 1, :, :4].T
    torch.testing.assert_close(product, alone.A[:, :4] @ alone.B[:, :4].T, rtol=1e-7, atol=1e-9)
