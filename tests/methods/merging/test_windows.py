"""Windows, positions and buffers of merged entries: every row by itself."""

from __future__ import annotations

import pytest
import torch

import kvgauge
from kvgauge.architecture.rotary import Rotary
from kvgauge.methods.merging.entry_buffers import EntryBuffers
from kvgauge.methods.merging.positions import NewTokens, RunningPositions
from kvgauge.methods.merging.windows import Windows


def windows(limits: list[int], added: list[int]) -> Windows:
    made = Windows(8, lambda: limits)
    made.begin(len(limits))
    made.add(added)
    return made


def test_a_window_ends_with_the_first_row_that_has_its_tokens() -> None:
    made = windows([10, 10], [3, 5])
    assert made.end(0, 20, None) == 3  # the second row has 5 of 8
    assert made.end(0, 2, None) == 2
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, :6] = False
    assert made.end(0, 20, valid) == 5  # by the first row: the second begins behind its padding
    assert made.end(5, 6, valid[:, :6]) == 6


def test_rows_are_due_and_over_their_limits_one_by_one() -> None:
    made = windows([6, 6, 20], [8, 7, 8])
    assert made.due() == [True, False, True]
    assert made.surplus(made.due()) == [2, 0, 0]
    assert made.merges_ahead()
    made.restart(made.due())
    assert made.fresh == [0, 7, 0]
    assert not windows([20, 20, 20], [8, 7, 8]).merges_ahead()
    made.fixed = [3, 3, 3]
    assert made.surplus([True] * 3) == [5, 4, 5]


def test_only_padding_between_entries_and_new_tokens_interrupts() -> None:
    made = windows([9, 9], [4, 0])
    assert not made.interrupted([3, 1], 3)  # the second row has nothing that its tokens could stand apart from
    assert made.interrupted([2, 3], 3)


def test_rows_are_chosen_taken_apart_and_put_together() -> None:
    made = windows([5, 6, 7], [1, 2, 3])
    made.fixed = [5, 6, 7]
    made.take([True, False, True])
    rows = []
    for index in range(3):
        row = Windows(8, list)
        row.hold_row(made, index)
        rows.append(row)
    assert [(row.counts, row.taken, row.fixed) for row in rows] == [([1], [1], [5]), ([2], [0], [6]), ([3], [1], [7])]
    made.hold_rows(rows[::-1])
    assert (made.counts, made.fresh, made.taken, made.fixed) == ([3, 2, 1], [3, 2, 1], [1, 0, 1], [5, 6, 7])
    made.map_batch(lambda numbers: numbers[torch.tensor([2, 2])], torch.device("cpu"))
    assert (made.counts, made.fixed) == ([1, 1], [7, 7])


@pytest.mark.parametrize("new_lags", [None, torch.tensor([[0, 0, 0], [-2, -2, -2]])])
@pytest.mark.parametrize("lags", [[0, 0], [3, 0]])
def test_new_tokens_are_turned_from_the_models_positions_to_the_running_ones(lags, new_lags, tiny) -> None:
    rotary = Rotary(tiny("tiny/llama"))
    query, keys = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 3, 16)
    positions, made = torch.arange(20, 23)[None].expand(2, -1), RunningPositions(rotary)
    made.begin([0, 0])
    made.add(torch.tensor(lags))
    actual = made.place(rotary.rotate(query, positions), rotary.rotate(keys, positions), new_lags)
    running = positions - torch.tensor(lags)[:, None] + (0 if new_lags is None else new_lags)
    for placed, plain in zip(actual, (query, keys), strict=True):
        torch.testing.assert_close(placed, rotary.rotate(plain, running), rtol=1e-4, atol=1e-5)
    assert (made.nbytes() > 0) == (any(lags) and new_lags is None)
    made.forget()
    assert made.nbytes() == 0


def test_a_part_of_the_new_tokens() -> None:
    valid = torch.tensor([[False, True, True]])
    part = NewTokens(valid, None).part(1, 3)
    assert part.valid is not None and part.valid.tolist() == [[True, True]] and part.lags is None


def test_single_tokens_have_no_cardinalities_until_one_is_padding() -> None:
    held, keys = EntryBuffers(), torch.randn(2, 2, 3, 4)
    held.append(keys, keys, None)
    assert held.cardinalities is None
    held.append(keys, keys, torch.tensor([[True] * 3, [False, True, True]]))
    assert held.cardinalities is not None
    assert held.cardinalities.tolist() == [[1] * 6, [1, 1, 1, 0, 1, 1]]
    held.add_attention(torch.ones(2, 2, 6))
    held.restart_attention([True, False])
    assert held.read([0.0, 0.0], 1).shares.sum(dim=(1, 2)).tolist() == [0.0, 12.0]
    assert set(held.nbytes_by_part()) == {"keys", "values", "cardinalities", "statistics"}
    held.settle()
    assert held.nbytes_by_part()["statistics"] == 0
    assert held.nbytes_by_part()["keys"] == 2 * 2 * 6 * 4 * 4


def test_the_shares_of_young_entries_are_means_over_those_who_could_see_them() -> None:
    held, keys = EntryBuffers(), torch.randn(1, 1, 4, 2)
    held.append(keys, keys, None)
    held.add_attention(torch.full((1, 1, 4), 6.0))
    assert held.read([3.0], 2).shares.flatten().tolist() == [1.0, 1.0, 1.5, 3.0]  # seen by 3, 3, 2 and 1 queries of 2


@pytest.mark.parametrize("name", ["kvslimmer", "streaming_llm"])
def test_a_limit_within_the_start_may_still_rise_until_the_length_is_known(name: str, tiny) -> None:
    method = kvgauge.build_method(name, start=8, budget=0.25)
    policy = method.new_cache(tiny("tiny/llama")).layers[0].policy
    assert policy.limit(20, sure=False) == 9
    with pytest.raises(kvgauge.UserError, match="keeps 4 entries of 20 tokens, and its 8 first"):
        policy.limit(20, sure=True)
    assert (
        kvgauge.build_method(name, start=8, budget=1.0)
        .new_cache(tiny("tiny/llama"))
        .layers[0]
        .policy.limit(3, sure=True)
        == 3
    )  # nothing is over the limit


def test_behind_the_context_the_limits_grow_with_every_row() -> None:
    made = windows([10, 10], [8, 7])
    made.restart([True, True])
    made.counts = [10, 9]
    made.go_on(4, [40, 30], lambda tokens: tokens // 4)
    assert made.grows and made.limits == [11, 8]  # by the tokens that there will be when the windows end
    made.add([4, 3])
    assert made.due() == [True, False] and made.surplus(made.due()) == [3, 0]
    made.restart(made.due())
    assert made.limits == [12, 8] and made.end(0, 9, None) == 1
    one, both = Windows(8, list), Windows(8, list)
    one.hold_row(made, 0)
    assert one.limits == [12] and one.window == 4
    both.go_on(4, [0, 0], lambda tokens: 0)
    both.hold_rows([one, one])
    assert both.limits == [12, 12]
    made.map_batch(lambda rows: rows.flip(0), torch.device("cpu"))
    assert made.limits == [8, 12]
