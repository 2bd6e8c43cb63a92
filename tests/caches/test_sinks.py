"""Sinks in rows with and without padding: each row's own first tokens, seen once."""

from __future__ import annotations

import torch

from kvgauge.caches.attention import causal_mask
from kvgauge.caches.sinks import ExactSinks


def states(batch, tokens):
    return torch.randn(2, batch, 3, tokens, 4)


def test_without_padding_they_are_cut_off_and_put_back():
    keys, values = states(2, 10)
    sinks = ExactSinks(4)
    left_keys, left_values, valid = sinks.take(keys, values, None)
    assert (left_keys.shape[2], sinks.cut, valid) == (6, 4, None)
    restored = sinks.restored(left_keys, left_values)
    assert torch.equal(restored[0], keys)
    assert torch.equal(restored[1], values)
    assert sinks.nbytes() == 2 * 2 * 3 * 4 * 4 * 4


def test_a_row_keeps_one_token_for_the_subspace():
    keys, values = states(1, 3)
    sinks = ExactSinks(8)
    assert sinks.take(keys, values, None)[0].shape[2] == 1
    assert len(sinks) == 2


def test_padded_rows_have_their_own_sinks_and_every_token_is_seen_once():
    keys, values = states(3, 10)
    valid = torch.ones(3, 10, dtype=torch.bool)
    valid[1, :4], valid[2, :8] = False, False  # the last row has two tokens, and so one sink
    sinks = ExactSinks(3)
    left_keys, _, rest = sinks.take(keys, values, valid)
    assert torch.equal(left_keys, keys)
    assert rest.sum(dim=1).tolist() == [7, 3, 1]
    mask = (causal_mask(1, 10, keys.device) & valid[:, None, None]).expand(3, 1, 1, 10)
    ordered = sinks.mask(mask, 1, 10)
    assert ordered.shape[-1] == 13
    assert torch.equal(ordered.sum(dim=-1).flatten(), valid.sum(dim=1))
    seen = torch.cat([sinks.keys.view(), keys], dim=2)
    for row in range(3):
        mine = seen[row, 0][ordered[row, 0, 0]]
        assert torch.equal(mine, keys[row, 0][valid[row]])
