"""Merging and evicting stored entries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvgauge
from kvgauge.architecture.rotary import Rotary
from kvgauge.attend.counted_attention import cardinality_attention
from kvgauge.methods.merging.merge_entries import RULES, Entries, averaged_hessian, current_hessian, evict, merge

BATCH, HEADS, COUNT, DIM = 2, 2, 12, 16


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return kvgauge.load_model("tiny/llama")[0]


@pytest.fixture
def rotary(model: PreTrainedModel) -> Rotary:
    return Rotary(model)


def entries(rule: str = "mean") -> Entries:
    torch.manual_seed(1)
    shares = torch.rand(BATCH, HEADS, COUNT)
    keys, values = (torch.randn(BATCH, HEADS, COUNT, DIM) for _ in range(2))
    made = Entries(keys, values, torch.ones(BATCH, COUNT, dtype=torch.int32), shares / shares.sum(-1, keepdim=True))
    if rule == "hessian":
        made.hessian = current_hessian(made)
    if rule == "fisher":
        made.hessian = torch.rand(BATCH, HEADS, COUNT, DIM)
    if rule == "gradient":
        made.hessian = torch.randn(BATCH, HEADS, COUNT, DIM)
    return made


def pairs(*chosen: int) -> Tensor:
    mask = torch.zeros(BATCH, COUNT - 1, dtype=torch.bool)
    mask[:, list(chosen)] = True
    return mask


@pytest.mark.parametrize("rule", RULES)
def test_merging_equal_keys_is_lossless(rotary: Rotary, rule: str) -> None:
    before = entries(rule)
    chosen = pairs(2, 3, 7)  # a chain of three and a pair
    for place in (2, 3, 7):
        # equal before the rotation, and the same position: the rotated keys are equal
        before.keys[:, :, place + 1] = before.keys[:, :, place]
    rotary.theta = torch.zeros_like(rotary.theta)
    after, merges, guarded = merge(before, chosen, rule, None, rotary)
    assert after.cardinalities[0].tolist() == [1, 1, 3, 1, 1, 2, 1, 1, 1]
    assert merges.tolist() == [2 * HEADS] * BATCH
    assert guarded.tolist() == [0, 0]
    query = torch.randn(BATCH, 4, 1, DIM)
    expected = cardinality_attention(query, before.keys, before.values, None, DIM**-0.5)
    torch.testing.assert_close(
        cardinality_attention(query, after.keys, after.values, after.cardinalities, DIM**-0.5), expected
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("clip", [None, 2])
def test_keys_are_merged_before_the_rotation(rotary: Rotary, rule: str, clip: int | None) -> None:
    """The stored, rotated keys are those of merging pre-RoPE keys and rotating to the running positions."""
    before = entries(rule)
    plain = rotary.unrotate(before.keys, before.positions)
    after, _, _ = merge(before, pairs(0, 1, 5), rule, clip, rotary)
    assert after.cardinalities[0].tolist() == [3 if clip is None else 2, 1, 1, 2, *([1] * 5)]
    merged = rotary.unrotate(after.keys, after.positions)
    torch.testing.assert_close(merged[:, :, 1:3], plain[:, :, 3:5], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged[:, :, 4:], plain[:, :, 7:], rtol=1e-4, atol=1e-5)
    if rule == "mean":
        torch.testing.assert_close(merged[:, :, 0], plain[:, :, :3].mean(2), rtol=1e-4, atol=1e-5)
    if rule == "fisher":
        assert before.hessian is not None
        weights = before.hessian[:, :, 5:7] / before.hessian[:, :, 5:7].sum(2, keepdim=True)
        torch.testing.assert_close(merged[:, :, 3], (weights * plain[:, :, 5:7]).sum(2), rtol=1e-4, atol=1e-5)


def test_unmerged_entries_do_not_change_by_a_bit(rotary: Rotary) -> None:
    before = entries()
    after, _, _ = merge(before, pairs(4), "mean", None, rotary)
    assert torch.equal(after.keys[:, :, :4], before.keys[:, :, :4])
    assert torch.equal(after.keys[:, :, 5:], before.keys[:, :, 6:])
    assert torch.equal(after.values[:, :, 5:], before.values[:, :, 6:])


def test_values_are_sums_over_the_clipped_cardinality(rotary: Rotary) -> None:
    before = entries()
    after, _, _ = merge(before, pairs(3, 4, 5), "mean", 2, rotary)
    assert after.cardinalities[0, 3] == 2
    torch.testing.assert_close(after.values[:, :, 3] * 2, before.values[:, :, 3:7].sum(2))


def test_what_a_merged_entry_remembers(rotary: Rotary) -> None:
    before = entries("fisher")
    assert before.hessian is not None
    after, _, _ = merge(before, pairs(1), "fisher", None, rotary)
    h1, h2 = before.hessian[:, :, 1], before.hessian[:, :, 2]
    a, b = h1 / (h1 + h2), h2 / (h1 + h2)
    assert after.hessian is not None
    torch.testing.assert_close(after.hessian[:, :, 1], a**2 * h1 + b**2 * h2)
    torch.testing.assert_close(after.shares[:, :, 1], before.shares[:, :, 1:3].sum(2))


def test_hessians_are_averaged_over_windows() -> None:
    now, before = torch.full((1, 1, 2, 1), 4.0), torch.tensor([1.0, torch.nan]).view(1, 1, 2, 1)
    assert averaged_hessian(now, None, torch.tensor([3])).flatten().tolist() == [4.0, 4.0]
    assert averaged_hessian(now, before, torch.tensor([3])).flatten().tolist() == pytest.approx([2.0, 4.0])


def test_shorter_rows_stay_at_the_end(rotary: Rotary) -> None:
    before = entries()
    before.cardinalities[0, :5] = 0
    chosen = pairs(8)
    chosen[1, 1:4] = True
    after, _, _ = merge(before, chosen, "mean", None, rotary)
    assert after.cardinalities.tolist() == [[0, 0, 1, 1, 1, 2, 1, 1], [1, 4, 1, 1, 1, 2, 1, 1]]
    assert torch.equal(after.keys[0, :, 2:5], before.keys[0, :, 5:8])


def test_eviction_moves_what_follows(rotary: Rotary) -> None:
    before = entries()
    plain = rotary.unrotate(before.keys, before.positions)
    after = evict(before, torch.tensor([2, 2]), torch.tensor([3, 5]), rotary)
    assert after.valid.sum(1).tolist() == [9, 7]
    assert after.positions[0].tolist() == list(range(9))
    merged = rotary.unrotate(after.keys, after.positions)
    torch.testing.assert_close(merged[0, :, 2:], plain[0, :, 5:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged[1, :, 4:], plain[1, :, 7:], rtol=1e-4, atol=1e-5)
