"""Interpolation on the sphere, exact lengths, exact retained tokens, and batches that retain different numbers."""

from __future__ import annotations

import math

import pytest
import torch

from kvgauge.methods.across_layers.merged_pair import MergedSegment, MergedStates, MergeRule, angle, slerp


def unit(*values):
    return torch.nn.functional.normalize(torch.tensor(values, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_slerp_turns_by_its_share_of_the_angle(share):
    first, second = unit(1, 0, 0), unit(math.cos(1.2), math.sin(1.2), 0)
    between = slerp(first, second, share)
    assert float(angle(first, between)) == pytest.approx(share * 1.2, abs=1e-12)
    assert float(between.norm()) == pytest.approx(1.0)


def test_slerp_of_equal_and_opposite_directions_is_finite():
    first = unit(1, 2, 3)
    torch.testing.assert_close(slerp(first, first, 0.3), first)
    assert bool(torch.isfinite(slerp(first, -first, 0.5)).all())


def merged(first, second, rule, valid=None):
    states = MergedStates()
    states.merge(first, second, valid, rule)
    return states


def test_lengths_are_exact_and_directions_shared():
    first, second = torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    states = merged(first, second, MergeRule(0.5, 1.0, lambda tokens: 0))
    for layer, exact in enumerate((first, second)):
        torch.testing.assert_close(states.dense(layer).norm(dim=-1), exact.norm(dim=-1))
    unit_first, unit_second = (torch.nn.functional.normalize(states.dense(layer), dim=-1) for layer in range(2))
    torch.testing.assert_close(unit_first, unit_second)


def test_gamma_keeps_the_distant_tokens():
    first = torch.nn.functional.normalize(torch.randn(1, 1, 10, 4), dim=-1)
    second = first.clone()
    second[0, 0, 3], second[0, 0, 7] = -first[0, 0, 3], torch.randn(4)
    states = merged(first, second, MergeRule(0.5, 0.95))
    assert states.columns.view().flatten().tolist() == [3]  # opposite: distance 1
    assert torch.equal(states.dense(1)[0, 0, 3], second[0, 0, 3])
    everything = merged(first, second, MergeRule(0.5, 0.0))
    assert torch.equal(everything.dense(0), first)
    assert torch.equal(everything.dense(1), second)


def test_attention_without_rebuilding_is_attention_to_what_is_stored():
    states = [torch.randn(2, 2, 30, 8) for _ in range(4)]
    rule = MergeRule(0.5, 0.9, lambda tokens: 4)
    keys, values = merged(states[0], states[1], rule), merged(states[2], states[3], rule)
    segment = MergedSegment(keys, values, 1)
    query = torch.randn(2, 2, 6, 8)
    torch.testing.assert_close(segment.scores(query), query @ keys.dense(1).transpose(-1, -2), atol=1e-5, rtol=1e-5)
    weights = torch.rand(2, 2, 6, 30)
    torch.testing.assert_close(segment.mix(weights), weights @ values.dense(1), atol=1e-5, rtol=1e-5)


def test_sequences_that_retain_fewer_tokens_are_what_they_are_alone():
    first, second = torch.randn(2, 2, 24, 8), torch.randn(2, 2, 24, 8)
    valid = torch.ones(2, 24, dtype=torch.bool)
    valid[1, :9] = False
    rule = MergeRule(0.5, 0.0, lambda tokens: tokens // 3)
    batch = merged(first, second, rule, valid)
    alone = merged(first[1:, :, 9:], second[1:, :, 9:], rule)
    torch.testing.assert_close(batch.dense(0)[1, :, 9:], alone.dense(0)[0])
    torch.testing.assert_close(batch.dense(1)[1, :, 9:], alone.dense(1)[0])


@pytest.mark.parametrize("padded", [False, True])
def test_tokens_merged_later_are_merged_as_they_would_have_been_at_once(padded):
    first, second = torch.randn(2, 2, 30, 8), torch.randn(2, 2, 30, 8)
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[1, :4] = not padded
    rule = MergeRule(0.5, 0.0)  # everything stays exact
    whole, parts = merged(first, second, rule, valid), MergedStates()
    for start, stop in ((0, 18), (18, 30)):
        parts.merge(first[:, :, start:stop], second[:, :, start:stop], valid, rule)
    for layer in (0, 1):
        torch.testing.assert_close(
            parts.dense(layer)[valid[:, None].expand(-1, 2, -1)], whole.dense(layer)[valid[:, None].expand(-1, 2, -1)]
        )


def test_a_count_by_tokens_is_that_of_all_of_them():
    rule = MergeRule(0.5, 0.0, lambda tokens: tokens // 3)
    states = MergedStates()
    for start, stop in ((0, 30), (30, 40), (40, 42)):
        states.merge(torch.randn(1, 2, stop - start, 8), torch.randn(1, 2, stop - start, 8), None, rule)
        assert len(states.columns) == stop // 3
    assert len(set(states.columns.view()[0, :, 0].tolist())) == 14
