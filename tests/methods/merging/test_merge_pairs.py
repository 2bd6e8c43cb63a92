"""The choice of pairs, against a greedy loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvgauge.methods.merging.merge_pairs import choose_pairs, disjoint, place_in_run, ranks


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


def test_places_in_runs() -> None:
    pairs = torch.tensor([[False, True, True, False, True]])
    assert place_in_run(pairs).tolist() == [[0, 0, 1, 2, 0, 1]]


def test_bounded_pairs_do_not_overlap_and_are_among_the_cheapest() -> None:
    cost = torch.tensor([[4.0, 1.0, 2.0, 3.0, 9.0]])
    # 1 is taken; 2 and 4 overlap it; 3 is not among the three cheapest's matching: 2 ruled it in, then 1 ruled 2 out
    assert choose_pairs(cost, torch.tensor([3]), "bounded").tolist() == [[False, True, False, True, False]]
    assert choose_pairs(cost, torch.tensor([1]), "bounded").tolist() == [[False, True, False, False, False]]


def test_bounded_pairs_stay_within_the_clip_while_others_do() -> None:
    cost = torch.tensor([[1.0, 5.0, 2.0], [1.0, 5.0, 2.0]])
    within = torch.tensor([[False, True, False], [False, False, False]])
    assert choose_pairs(cost, torch.tensor([1, 1]), "bounded", within).tolist() == [
        [False, True, False],
        [True, False, False],
    ]
