"""Growing buffers: the same rows in both layouts, bytes that are really there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvgauge.simulation.machine import SimulatedMachine
from kvgauge.simulation.tensor import simulated
from kvgauge.store.buffers import GrowingBuffer

LAYOUTS = pytest.mark.parametrize("dimension_major", [False, True])


def rows(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(2, 3, tokens, 5, generator=torch.Generator().manual_seed(seed))


@LAYOUTS
def test_appended_rows_come_back_in_order(dimension_major: bool) -> None:
    buffer, parts = GrowingBuffer(step=4, dimension_major=dimension_major), [rows(n, n) for n in (3, 1, 7, 2)]
    for part in parts:
        buffer.append(part)
    assert len(buffer) == 13
    assert torch.equal(buffer.view(), torch.cat(parts, dim=2))


@LAYOUTS
def test_set_keeps_no_spare_capacity_and_no_foreign_storage(dimension_major: bool) -> None:
    buffer, larger = GrowingBuffer(dimension_major=dimension_major), rows(100)
    buffer.set(larger[:, :, 10:20])
    assert buffer.nbytes() == 2 * 3 * 10 * 5 * 4
    expected = larger[:, :, 10:20].clone()
    larger.zero_()
    assert torch.equal(buffer.view(), expected)


@LAYOUTS
def test_take_copies_nothing(dimension_major: bool) -> None:
    buffer, given = GrowingBuffer(dimension_major=dimension_major), rows(6)
    stored = given.mT.contiguous() if dimension_major else given
    buffer.take(stored)
    assert torch.equal(buffer.view(), given)
    assert buffer.view().untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()


@LAYOUTS
def test_an_append_leaves_shared_rows_alone(dimension_major: bool) -> None:
    buffer, shared = GrowingBuffer(dimension_major=dimension_major), rows(6)
    before = shared.clone()
    buffer.share(shared)
    buffer.append(rows(1, seed=1))
    assert torch.equal(shared, before)
    assert torch.equal(buffer.view(), torch.cat([before, rows(1, seed=1)], dim=2))


@LAYOUTS
def test_drop_front_and_crop(dimension_major: bool) -> None:
    buffer, whole = GrowingBuffer(dimension_major=dimension_major), rows(9)
    buffer.append(whole)
    assert torch.equal(buffer.drop_front(4), whole[:, :, :4])
    assert torch.equal(buffer.view(), whole[:, :, 4:])
    buffer.crop(2)
    assert torch.equal(buffer.view(), whole[:, :, 4:6])


@LAYOUTS
def test_batch_selection(dimension_major: bool) -> None:
    buffer, whole = GrowingBuffer(dimension_major=dimension_major), rows(9)
    buffer.append(whole)
    buffer.map_batch(lambda stored: stored[[1, 0, 1]])
    assert torch.equal(buffer.view(), whole[[1, 0, 1]])
    buffer.append(rows(70)[[0, 0, 0]])
    assert len(buffer) == 79


@LAYOUTS
def test_reserved_capacity_is_used_without_growing(dimension_major: bool) -> None:
    buffer = GrowingBuffer(dimension_major=dimension_major)
    buffer.reserve(200)
    buffer.append(rows(1))
    size = buffer.nbytes()
    assert size == 2 * 3 * 200 * 5 * 4
    buffer.append(rows(199))
    assert buffer.nbytes() == size
    buffer.append(rows(1))
    assert buffer.nbytes() > size


def test_the_layout_is_what_its_name_says() -> None:
    buffer = GrowingBuffer(dimension_major=True)
    buffer.append(rows(8))
    assert buffer.view().stride(-2) == 1


def test_reading_an_empty_buffer_is_refused() -> None:
    with pytest.raises(RuntimeError, match="empty"):
        GrowingBuffer().view()


def test_a_reservation_is_for_the_first_allocation_only() -> None:
    buffer = GrowingBuffer(step=8)
    buffer.reserve(200)
    buffer.append(rows(200))
    buffer.append(rows(1))
    assert buffer.nbytes() == 2 * 3 * (200 + 8) * 5 * 4


@LAYOUTS
def test_trim_gives_back_spare_capacity(dimension_major: bool) -> None:
    buffer, whole = GrowingBuffer(dimension_major=dimension_major), rows(9)
    buffer.reserve(100)
    buffer.append(whole)
    buffer.trim()
    assert buffer.nbytes() == whole.nbytes
    assert torch.equal(buffer.view(), whole)


def test_devices_read_one_token_after_another():
    rows = torch.randn(2, 3, 5, 4)
    with SimulatedMachine():
        placed = simulated(rows, "cuda:0")
        for fill in (GrowingBuffer.append, GrowingBuffer.set, GrowingBuffer.share):
            buffer = GrowingBuffer(dimension_major=True)
            fill(buffer, placed)
            assert buffer.view().stride(-1) == 1 and torch.equal(buffer.view().numbers, rows)
    buffer = GrowingBuffer(dimension_major=True)
    buffer.append(rows)
    assert buffer.view().stride(-2) == 1
