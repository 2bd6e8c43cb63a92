"""The choice of pairs, against a greedy loop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvgauge.methods.merging.merge_pairs import choose_pairs, disjoint, pair_costs, ranks


def greedy_matching(cost: list[float]) -> list[bool]:
    taken = [False] * len(cost)
    for index in sorted(range(len(cost)), key=lambda place: (cost[place], place)):
        neighbours = [place for place in (index - 1, index + 1) if 0 <= place < len(cost)]
        taken[index] = not any(taken[place] for place in neighbours)
    return taken


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40))
def test_disjoint_is_the_greedy_matching(cost: list[int]) -> None:
    assert disjoint(torch.tensor([cost], dtype=torch.float64))[0].tolist() == greedy_matching([float(c) for c in cost])


@pytest.mark.parametrize("pairs", ["chain", "disjoint"])
def test_the_cheapest_are_taken_row_by_row(pairs: str) -> None:
    torch.manual_seed(0)
    cost = torch.rand(3, 50)
    cost[0, :10] = torch.inf
    count = torch.tensor([5, 0, 12])
    chosen = choose_pairs(cost, count, pairs)
    assert chosen.sum(dim=1).tolist() == count.tolist()
    assert not chosen[0, :10].any()
    if pairs == "disjoint":
        assert not (chosen[:, :-1] & chosen[:, 1:]).any()
    else:
        for row in range(3):
            assert set(cost[row].argsort()[: count[row]].tolist()) == set(chosen[row].nonzero().flatten().tolist())


def test_no_more_pairs_than_there_are() -> None:
    cost = torch.tensor([[torch.inf, 3.0, 2.0, 1.0]])
    assert choose_pairs(cost, torch.tensor([9]), "chain").tolist() == [[False, True, True, True]]
    assert choose_pairs(cost, torch.tensor([9]), "disjoint").tolist() == [[False, True, False, True]]


def test_ranks_count_up_and_the_first_of_equals_is_lower() -> None:
    assert ranks(torch.tensor([[2.0, 1.0, 2.0, 0.0]])).tolist() == [[2, 1, 3, 0]]


def test_the_cost_of_a_pair_by_hand() -> None:
    shares = torch.tensor([[[9.0, 0.1, 0.2, 0.4], [9.0, 0.3, 0.1, 0.2]]])
    cardinalities = torch.tensor([[1, 2, 1, 3]])
    cost = pair_costs(shares, cardinalities, torch.tensor([1]), gamma=10.0)
    assert cost[0, 0] == math.inf  # the start is not merged with what follows
    expected = [0.7 * 3 * math.exp(-0.1), 0.9 * 4 * math.exp(-0.2)]
    assert cost[0, 1:].tolist() == pytest.approx(expected)
