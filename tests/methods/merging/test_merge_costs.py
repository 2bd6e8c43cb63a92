"""What pairs cost, by hand and against float64."""

from __future__ import annotations

import math

import pytest
import torch

import kvgauge
from kvgauge.architecture.rotary import Rotary
from kvgauge.methods.merging.merge_costs import RIDGE, leverages, pair_costs
from kvgauge.methods.merging.merge_entries import Entries

DIM = 16


@pytest.fixture(scope="module")
def rotary() -> Rotary:
    return Rotary(kvgauge.load_model("tiny/llama")[0])


def entries() -> Entries:
    shares = torch.tensor([[[9.0, 0.1, 0.2, 0.4], [9.0, 0.3, 0.1, 0.2]]])
    return Entries(torch.zeros(1, 2, 4, DIM), torch.zeros(1, 2, 4, DIM), torch.tensor([[1, 2, 1, 3]]), shares)


@pytest.mark.parametrize(("cost", "tokens"), [("cardinality", (3, 4)), ("attention", (1, 1))])
def test_the_cost_of_a_pair_by_hand(rotary: Rotary, cost: str, tokens: tuple[int, int]) -> None:
    found = pair_costs(entries(), torch.tensor([1]), cost, 10.0, rotary)
    assert found[0, 0] == math.inf  # the start is not merged with what follows
    expected = [0.7 * tokens[0] * math.exp(-0.1), 0.9 * tokens[1] * math.exp(-0.2)]
    assert found[0, 1:].tolist() == pytest.approx(expected)


def test_one_scalar_in_the_place_of_the_cardinality_chooses_the_same_pairs(rotary: Rotary) -> None:
    """KVSlimmer's code multiplies every pair by the same number."""
    plain = pair_costs(entries(), torch.tensor([1]), "attention", 10.0, rotary)[0, 1:]
    assert plain.argsort().tolist() == (plain * 7.0).argsort().tolist() == [0, 1]


def test_leverages_against_a_dense_float64_formula(rotary: Rotary) -> None:
    torch.manual_seed(0)
    rows, heads, count = 2, 2, 40
    cardinalities = torch.randint(1, 4, (rows, count), dtype=torch.int32)
    cardinalities[1, :5] = 0
    first = torch.tensor([3, 8])
    keys, values = (torch.randn(rows, heads, count, DIM) for _ in range(2))
    made = Entries(keys, values, cardinalities, torch.ones(rows, heads, count))
    found = leverages(made, first, rotary)
    plain = rotary.shift(keys.double(), -made.positions)
    for row in range(rows):
        begin = int(first[row])
        weights = cardinalities[row, begin:].double()[:, None]
        for head in range(heads):
            parts = []
            for part in (plain[row, head, begin:], values[row, head, begin:].double()):
                part = part - (part * weights).sum(0) / weights.sum()
                parts.append(part / ((part.square() * weights).sum() / (weights.sum() * DIM)).sqrt())
            x = torch.cat(parts, dim=1)
            moments = x.T @ (weights * x)
            ridge = RIDGE * moments.trace() / len(moments) * torch.eye(2 * DIM, dtype=torch.float64)
            expected = (x @ torch.linalg.inv(moments + ridge) * x).sum(1)
            torch.testing.assert_close(found[row, head, begin:].double(), expected, rtol=1e-3, atol=1e-4)
        assert not found[row, :, :begin].any()


def test_what_stands_alone_costs_more_than_what_is_repeated(rotary: Rotary) -> None:
    torch.manual_seed(1)
    said = torch.randn(5, DIM).repeat(8, 1)
    said[20:23] = 3 * torch.randn(1, DIM) + 0.1 * torch.randn(3, DIM)  # a needle of three tokens that are alike
    values = said.flip(1).expand(1, 2, 40, DIM).clone()
    keys = rotary.shift(said.expand(1, 2, 40, DIM).contiguous(), torch.arange(40)[None])
    made = Entries(keys, values, torch.ones(1, 40, dtype=torch.int32), torch.full((1, 2, 40), 0.1))
    cost = pair_costs(made, torch.tensor([0]), "residual", 10.0, rotary)[0]
    needle = cost[20:22]
    assert float(needle.min()) > 2 * float(torch.cat([cost[:19], cost[23:]]).max())


def test_entries_that_are_all_the_same_cost_nothing(rotary: Rotary) -> None:
    keys = rotary.shift(torch.ones(1, 2, 6, DIM), torch.arange(6)[None])
    made = Entries(keys, torch.ones(1, 2, 6, DIM), torch.ones(1, 6, dtype=torch.int32), torch.ones(1, 2, 6))
    found = pair_costs(made, torch.tensor([1]), "residual", 10.0, rotary)
    assert found[0, 0] == math.inf
    assert found[0, 1:].isfinite().all()


def test_both_is_the_sum_of_the_two_over_their_means(rotary: Rotary) -> None:
    torch.manual_seed(4)
    made = entries()
    made.keys, made.values = torch.randn(1, 2, 4, DIM), torch.randn(1, 2, 4, DIM)
    first = torch.tensor([1])
    parts = [pair_costs(made, first, cost, 10.0, rotary)[0, 1:] for cost in ("cardinality", "residual")]
    both = pair_costs(made, first, "both", 10.0, rotary)[0]
    assert both[0] == math.inf
    torch.testing.assert_close(both[1:], sum(part / part.mean() for part in parts))
