"""Entries in the hands of another layer: their cardinalities in the scores, shorter rows, later tokens."""

from __future__ import annotations

import pytest
import torch

from kvgauge.layers.stored import StoredLayer
from kvgauge.methods.merging.frozen_entries import FrozenEntries
from kvgauge.store.storage import EXACT, QuantizedStorage


def states(heads, tokens, seed):
    return torch.randn(2, heads, tokens, 16, generator=torch.Generator().manual_seed(seed))


def frozen(cardinalities, storage=EXACT):
    return FrozenEntries(StoredLayer(storage), states(2, 5, 1), states(2, 5, 2), cardinalities)


@pytest.mark.parametrize("queries", [1, 4])
def test_an_entry_weighs_as_much_as_its_tokens(queries):
    cardinalities = torch.tensor([[1, 3, 2, 1, 1], [0, 0, 2, 4, 1]], dtype=torch.int32)
    entries = frozen(cardinalities)
    entries.append(states(2, queries, 3), states(2, queries, 4), None)
    query = states(4, queries, 5)
    actual = entries.attend(query, 0.25)
    keys = torch.cat([states(2, 5, 1), states(2, queries, 3)], dim=2).double()
    values = torch.cat([states(2, 5, 2), states(2, queries, 4)], dim=2).double()
    for row in range(2):
        counts = torch.cat([cardinalities[row], torch.ones(queries, dtype=torch.int32)])
        for step in range(queries):
            seen = torch.arange(5 + queries) <= 5 + step
            tokens = torch.repeat_interleave(torch.arange(5 + queries), counts * seen)
            for head in range(4):
                scores = query[row, head, step].double() @ keys[row, head // 2, tokens].mT * 0.25
                expected = scores.softmax(-1) @ values[row, head // 2, tokens]
                torch.testing.assert_close(actual[row, step, head].double(), expected, rtol=1e-4, atol=1e-5)


def test_single_tokens_need_no_cardinalities_until_padding_comes():
    entries = frozen(None)
    assert set(entries.nbytes_by_part()) == {"keys", "values"}
    valid = torch.tensor([[True, True], [False, True]])
    entries.append(states(2, 2, 3), states(2, 2, 4), valid)
    assert entries.nbytes_by_part()["cardinalities"] > 0 and len(entries) == 7
    hidden = frozen(None)
    changed = states(2, 2, 3)
    changed[1, :, 0] = 9.0
    hidden.append(changed, states(2, 2, 4), valid)
    query = states(4, 2, 5)
    assert torch.equal(entries.attend(query, 0.25)[1, 1], hidden.attend(query, 0.25)[1, 1])


def test_empty_places_have_no_part_in_the_grid():
    cardinalities = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 2, 4, 1]], dtype=torch.int32)
    storage = QuantizedStorage(4, "channel", group=8)
    keys = states(2, 5, 1)
    keys[1, :, :2] = 1e4
    loud = FrozenEntries(StoredLayer(storage), keys, states(2, 5, 2), cardinalities)
    quiet = frozen(cardinalities, storage)
    for entries in (loud, quiet):
        entries.append(states(2, 1, 3), states(2, 1, 4), None)
    torch.testing.assert_close(loud.attend(states(4, 1, 5), 0.25)[1], quiet.attend(states(4, 1, 5), 0.25)[1])
