"""Masks that are not made: later chunks attend as those with a mask do, whatever cache holds the tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import sdpa_mask

from kvgauge.attend.spelling import spelt_out


@pytest.mark.parametrize("padding", [None, torch.ones(2, 9, dtype=torch.bool)])
@pytest.mark.parametrize(("queries", "offset"), [(9, 0), (4, 5), (1, 8)])
def test_plainly_causal_is_not_spelt_out(padding, queries, offset):
    assert spelt_out(2, queries, 9, q_offset=offset, attention_mask=padding) is None
    assert spelt_out(2, queries, 9, q_offset=offset, attention_mask=padding, local_size=10) is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention_mask": torch.arange(9).expand(2, -1) > 1},
        {"local_size": 6},
        {"allow_is_causal_skip": False},
        {"q_offset": torch.tensor(5)},
        {"q_offset": 2},  # places behind the queries: a static cache
        {"q_offset": 0},
    ],
)
def test_everything_else_is(arguments):
    given = {"q_offset": 5, "attention_mask": None} | arguments
    mask = spelt_out(2, 4, 9, **given)
    expected = sdpa_mask(2, 4, 9, **(given | {"allow_is_causal_skip": False}))
    assert mask is not None and torch.equal(mask, expected)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_chunks_into_other_caches(static, padded, tiny, tokens):
    model, ids = tiny("tiny/llama"), tokens(2, 40)
    mask = torch.ones(2, 40, dtype=torch.long)
    if padded:
        mask[1, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    cache = StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache()
    parts = []
    with torch.no_grad():
        for start, stop in ((0, 16), (16, 33), (33, 39), (39, 40)):
            now = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
            parts.append(model(ids[:, start:stop], past_key_values=cache, **now).logits)
    actual = torch.cat(parts, dim=1)
    seen = mask.bool()
    torch.testing.assert_close(actual[seen], expected[seen], rtol=1e-3, atol=1e-4)


def test_windows_between_full_layers(attached, tokens):
    model, ids = attached("gemma3"), tokens(1, 90)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(ids).logits
        parts = [model(part, past_key_values=cache).logits for part in ids.split(37, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-3, atol=1e-3)
