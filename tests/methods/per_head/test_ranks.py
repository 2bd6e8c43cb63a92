"""From budgets and tolerances to ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvgauge.errors import UserError
from kvgauge.methods.per_head.ranks import budget_ranks, epsilon_ranks, explicit_ranks


@given(st.floats(0.02, 1.0), st.integers(1, 48), st.sampled_from([16, 64, 128]))
def test_a_budget_is_never_exceeded_and_missed_by_less_than_one_rank_of_one_layer(budget, layers, head_dim):
    numbers = 2 * head_dim * budget
    if numbers * layers < 2 * layers:
        with pytest.raises(UserError, match="does not pay for rank 1"):
            budget_ranks("m", numbers, layers, head_dim)
        return
    ranks = budget_ranks("m", numbers, layers, head_dim)
    stored = sum(rank_k + rank_v for rank_k, rank_v in ranks)
    assert stored <= numbers * layers + 1e-6
    assert stored > numbers * layers - 1
    assert all(1 <= rank <= head_dim for pair in ranks for rank in pair)
    assert max(map(sum, ranks)) - min(map(sum, ranks)) <= 1


def test_halves_and_three_quarters_of_64():
    assert budget_ranks("m", 64.0, 2, 64) == [(32, 32)] * 2
    assert budget_ranks("m", 96.0, 2, 64) == [(48, 48)] * 2


def test_epsilon_is_the_smallest_rank_that_leaves_out_its_square():
    energies = torch.tensor([[[0.9, 0.085, 0.01, 0.005], [0.9, 0.085, 0.01, 0.005]]], dtype=torch.float64)
    assert epsilon_ranks(energies, energies, 0.15) == [(2, 2)]  # leaves out 0.015 ≤ 0.0225
    assert epsilon_ranks(energies, energies, 0.1) == [(3, 3)]  # leaves out 0.005 ≤ 0.01 < 0.015
    assert epsilon_ranks(energies, energies, 0.01) == [(4, 4)]


def test_epsilon_averages_the_shares_of_the_heads():
    heads = torch.tensor([[[1.0, 0.0, 0.0], [500.0, 300.0, 200.0]]], dtype=torch.float64)
    # after rank 1 the heads leave out 0 and 0.5 of their energy: 0.25 in the mean
    assert epsilon_ranks(heads, heads, 0.51) == [(1, 1)]
    assert epsilon_ranks(heads, heads, 0.49) == [(2, 2)]


@pytest.mark.parametrize("epsilon", [0.0, 1.0, -0.5])
def test_epsilon_out_of_range(epsilon):
    energies = torch.ones(1, 1, 4)
    with pytest.raises(UserError, match="epsilon"):
        epsilon_ranks(energies, energies, epsilon)


@pytest.mark.parametrize(("rank_k", "rank_v"), [(0, 8), (8, 17), (17, 8)])
def test_ranks_out_of_range(rank_k, rank_v):
    with pytest.raises(UserError, match="outside 1 … 16"):
        explicit_ranks("m", rank_k, rank_v, 2, 16)
