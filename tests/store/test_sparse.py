from __future__ import annotations

import pytest
import torch

from kvgauge.store.buffers import GROWTH_STEP
from kvgauge.store.sparse import SparseRows, index_dtype

BLOCK = 16


def filled(batch=2, tokens=40, width=24, parts=(17, 1, 22), share=0.1):
    rows = torch.randn(batch, tokens, width).half().float()
    chosen = torch.rand(batch, tokens, width) < share
    sparse = SparseRows(width, torch.float16, BLOCK)
    for part, mask in zip(rows.split(parts, 1), chosen.split(parts, 1), strict=True):
        sparse.append(part, mask)
    return sparse, torch.where(chosen, rows, 0.0), chosen


def dense(sparse, tokens, width=24, batch=2):
    blocks = torch.zeros(batch, tokens, width).split(BLOCK, 1)
    for index, block in enumerate(blocks):
        sparse.write(block, index * BLOCK)
    return torch.cat(blocks, dim=1)


@pytest.mark.parametrize("parts", [(17, 1, 22), (GROWTH_STEP + 3, 1, 5), (1,) * (GROWTH_STEP + 2), (100,)])
def test_entries_come_back_in_their_places(parts):
    sparse, expected, _ = filled(tokens=sum(parts), parts=parts)
    assert torch.equal(dense(sparse, sum(parts)), expected)
    sparse.trim()
    assert torch.equal(dense(sparse, sum(parts)), expected)
    block = torch.zeros(2, BLOCK, 24)
    sparse.write(block, BLOCK)
    assert torch.equal(block, expected[:, BLOCK : 2 * BLOCK])


def test_bytes_are_those_of_counts_channels_and_entries():
    sparse, _, chosen = filled()
    sparse.trim()
    assert sparse.nbytes() == 2 * 40 * 2 + int(chosen.sum()) * (2 + 2)


@pytest.mark.parametrize("settled", [False, True])
def test_crop_then_append(settled):
    sparse, expected, _ = filled()
    if settled:
        sparse.trim()
    sparse.crop(25)
    rows = torch.ones(2, 3, 24)
    sparse.append(rows, torch.ones_like(rows, dtype=torch.bool))
    assert torch.equal(dense(sparse, 28), torch.cat([expected[:, :25], rows], dim=1))


def test_sequences_can_be_swapped_and_repeated():
    sparse, expected, _ = filled()
    sparse.map_batch(lambda rows: rows[torch.tensor([1, 0, 0])])
    assert torch.equal(dense(sparse, 40, batch=3), expected[[1, 0, 0]])
    rows = torch.ones(3, 1, 24)
    mask = torch.zeros_like(rows, dtype=torch.bool)
    mask[2] = True
    sparse.append(rows, mask)  # copies of a sequence go on alone
    assert torch.equal(dense(sparse, 41, batch=3)[:, 40], torch.where(mask, rows, 0.0)[:, 0])


def test_no_entries_at_all():
    sparse, expected, _ = filled(share=0.0)
    assert torch.equal(dense(sparse, 40), expected)


@pytest.mark.parametrize(("width", "dtype"), [(1024, torch.int16), (40_000, torch.int32)])
def test_channels_take_the_smallest_type_that_numbers_them(width, dtype):
    assert index_dtype(width) == dtype
