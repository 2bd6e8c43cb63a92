"""Sinks in rows with and without padding: each row's own first tokens, seen once, in every cache that has them."""

from __future__ import annotations

import pytest
import torch

import kvgauge
from kvgauge.attend.mask import Mask, causal_mask
from kvgauge.errors import UserError
from kvgauge.layers.sinks import ExactSinks


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
    sinks = ExactSinks(8, spare=1)
    assert sinks.take(keys, values, None)[0].shape[2] == 1
    assert len(sinks) == 2


def test_padded_rows_have_their_own_sinks_and_every_token_is_seen_once():
    keys, values = states(3, 10)
    valid = torch.ones(3, 10, dtype=torch.bool)
    valid[1, :4], valid[2, :8] = False, False  # the last row has two tokens, and so one sink
    sinks = ExactSinks(3, spare=1)
    left_keys, _, rest = sinks.take(keys, values, valid)
    assert torch.equal(left_keys, keys)
    assert rest.sum(dim=1).tolist() == [7, 3, 1]
    mask = (causal_mask(1, 10, keys.device) & valid[:, None, None]).expand(3, 1, 1, 10)
    ordered = sinks.mask(Mask.of(mask), 1, 10).whole(1, 13, keys.device).tensor
    assert ordered.shape[-1] == 13
    assert torch.equal(ordered.sum(dim=-1).flatten(), valid.sum(dim=1))
    seen = torch.cat([sinks.keys.view(), keys], dim=2)
    for row in range(3):
        mine = seen[row, 0][ordered[row, 0, 0]]
        assert torch.equal(mine, keys[row, 0][valid[row]])


@pytest.mark.parametrize("spare", [0, 1])
def test_they_cannot_be_cropped(spare):
    keys, values = states(2, 10)
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[1, :4] = False
    sinks = ExactSinks(3, spare=spare)
    sinks.take(keys, values, None)
    sinks.crop(3 + spare)
    with pytest.raises(UserError, match="3 exact sinks"):
        sinks.crop(2 + spare)
    sinks.take(keys, values, valid)
    sinks.crop(7)
    with pytest.raises(UserError, match="3 exact sinks"):
        sinks.crop(6)  # the second row's last sink stands in column 6


@pytest.mark.parametrize("cropped", [None, 3, 7, 9])
@pytest.mark.parametrize("padding", [None, (0, 3), (0, 5), (2, 4)])
def test_growing_goes_on_until_every_row_has_all_of_its_own(padding, cropped):
    """A context of 6 tokens, then one or two at a time; in the end every row sees each of its tokens once."""
    keys, values = states(2, 14)
    starts = torch.tensor(padding or (0, 0))
    valid = None if padding is None else torch.arange(14) >= starts[:, None]
    sinks, others = ExactSinks(7, grows=True), []
    others.append(sinks.take(keys[:, :, :6], values[:, :, :6], valid)[0])

    def add(start, stop):
        room = sinks.grow(keys[:, :, start:stop], values[:, :, start:stop], start)
        others.append(keys[:, :, start + room : stop])

    for start, stop in ((6, 7), (7, 9), (9, 10)):
        add(start, stop)
    if cropped is not None:
        sinks.crop(cropped)
        others = [torch.cat(others, dim=2)[:, :, : cropped - sinks.cut]]
        add(cropped, 10)
    for start in range(10, 14):
        add(start, start + 1)
    left = torch.cat(others, dim=2)
    assert len(sinks) == 7
    for row, start in enumerate(starts):
        assert torch.equal(sinks.keys.view()[row], keys[row, :, start : start + 7])
        assert torch.equal(sinks.values.view()[row], values[row, :, start : start + 7])
    mask = causal_mask(2, 14, keys.device) & (torch.ones(2, 1, 1, 14) > 0 if valid is None else valid[:, None, None])
    ordered = sinks.mask(Mask.of(mask), 2, 14).whole(2, 14, keys.device).tensor
    assert torch.equal(ordered.sum(dim=-1), mask.sum(dim=-1))
    seen = torch.cat([sinks.keys.view(), left], dim=2)
    for row in range(2):
        assert torch.equal(seen[row, 0][ordered[row, 0, 0]], keys[row, 0][mask[row, 0, 0]])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("kqsvd", {"rank": 6, "sinks": 8}),
        ("kqsvd", {"rank": 6, "sinks": 8, "window": 3}),
        ("kqsvd", {"rank": 6, "sinks": 8, "window": 60}),
        ("kqsvd", {"rank": 6, "sinks": 8, "compress_prefill": True}),
        ("xkv", {"rank": 6, "sinks": 8}),
        ("kvquant", {"bits": 2, "sinks": 8}),
    ],
)
@pytest.mark.parametrize("longer", [30, 6])
def test_a_padded_row_of_fewer_tokens_than_sinks_gives_its_logits_alone(name, settings, longer, tiny, fit, tokens):
    model, method = tiny("tiny/qwen3"), kvgauge.build_method(name, **settings)
    fitted, rows = fit(method, "tiny/qwen3"), (tokens(1, longer, seed=4), tokens(1, 4, seed=5))
    steps = tokens(1, 9, seed=6).split([1, 2, 4, 1, 1], dim=1)
    gap = longer - 4
    ids = torch.cat([rows[0], torch.nn.functional.pad(rows[1], (gap, 0))])
    mask = torch.ones(2, longer + 9, dtype=torch.long)
    mask[1, :gap] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = method.new_cache(model, fitted, context_length=longer)
    alone = [method.new_cache(model, fitted, context_length=row.shape[1]) for row in rows]
    with torch.no_grad():
        start = 0
        for part in (None, *steps):
            batch = ids if part is None else part.expand(2, -1)
            stop = start + batch.shape[1]
            asked = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
            actual = model(batch, past_key_values=cache, **asked).logits
            for row, (own, mine) in enumerate(zip(rows, alone, strict=True)):
                expected = model(own if part is None else part, past_key_values=mine).logits[0]
                error = (actual[row, -expected.shape[0] :] - expected).norm() / expected.norm()
                assert float(error) < 1e-4
            start = stop
