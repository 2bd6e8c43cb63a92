"""Weighted sums over runs of turned rows, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvgauge.architecture.rotary import rotate_half
from kvgauge.kernels.cpu import operators
from kvgauge.kernels.cpu.segment_mix import segment_mix

BATCH, HEADS, ENTRIES, COUNT = 2, 3, 50, 20


def inputs(dimension: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(dimension)
    rows = torch.randn(BATCH, HEADS, ENTRIES, dimension).to(dtype)
    weights = torch.randn(BATCH, HEADS, ENTRIES)
    weights[:, :, ::7] = 0.0
    segments = torch.randint(0, COUNT, (BATCH, ENTRIES)).sort(dim=1).values
    segments[segments == 5] = 6  # one without a row
    return rows, weights, segments


def turning(dimension: int) -> tuple[Tensor, Tensor]:
    angles = torch.randn(BATCH, 1, ENTRIES, dimension // 2).repeat(1, 1, 1, 2)
    return angles.cos(), angles.sin()


def expected(rows: Tensor, weights: Tensor, segments: Tensor, turned: tuple[Tensor, Tensor] | None) -> Tensor:
    rows = rows.double()
    if turned is not None:
        rows = rows * turned[0].double() + rotate_half(rows) * turned[1].double()
    chosen = segments[:, None] == torch.arange(COUNT)[:, None]  # (batch, segments, entries)
    return (chosen[:, None] * weights.double()[:, :, None]) @ rows


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("layout", ["plain", "spare", "side by side"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dimension", [2, 16, 38, 64, 128])
def test_sums_are_those_of_the_formula(dimension, dtype, layout, turned):
    rows, weights, segments = inputs(dimension, dtype)
    angles = turning(dimension) if turned else None
    wanted = expected(rows, weights, segments, angles)
    if layout == "spare":
        rows = torch.cat([rows, rows], dim=2)[:, :, :ENTRIES]
    if layout == "side by side":
        rows = rows.mT.contiguous().mT
    actual = segment_mix(rows, weights, segments, COUNT, angles)
    assert actual.dtype == dtype and actual.shape == (BATCH, HEADS, COUNT, dimension)
    assert not actual[:, :, 5].any()
    close = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(actual.double(), wanted, rtol=close, atol=close)


def test_a_row_alone_stays_as_it_is_and_rows_without_weight_are_not_read():
    rows, _, _ = inputs(16, torch.bfloat16)
    segments = torch.arange(ENTRIES).expand(BATCH, -1)
    unturned = (torch.ones(1, 1, 1, 16), torch.zeros(1, 1, 1, 16))
    weights = torch.ones(BATCH, 1, ENTRIES)
    assert torch.equal(segment_mix(rows, weights, segments, ENTRIES, unturned), rows)
    weights[:, :, 3] = 0.0
    rows[:, :, 3] = torch.nan
    mixed = segment_mix(rows, weights, segments, ENTRIES)
    assert not mixed[:, :, 3].any() and torch.equal(mixed[:, :, 4:], rows[:, :, 4:])


def test_the_number_of_threads_changes_no_bit():
    torch.manual_seed(0)
    rows, weights = torch.randn(2, 3, 1200, 64), torch.randn(2, 3, 1200)
    segments, threads = (torch.arange(1200) // 3).expand(2, -1), torch.get_num_threads()
    results = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(segment_mix(rows, weights, segments, 400))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("case", ["double", "weights", "gradient", "compiler"])
def test_what_it_is_not_compiled_for_is_left_to_torch(case, monkeypatch):
    rows, weights, segments = inputs(16, torch.float64 if case == "double" else torch.float32)
    if case == "compiler":
        monkeypatch.setattr(operators, "available", lambda: False)
    rows.requires_grad_(case == "gradient")
    assert segment_mix(rows, weights.double() if case == "weights" else weights, segments, COUNT) is None


def test_the_operator_can_be_traced():
    rows, weights, segments = inputs(16, torch.float32)
    for angles in ((None, None), turning(16)):
        torch.library.opcheck(torch.ops.kvgauge.segment_mix, (rows, weights, segments, COUNT, *angles))
