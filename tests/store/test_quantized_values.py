"""Codes, scales and minima against the plain formula in float64."""

from __future__ import annotations

import pytest
import torch

from kvgauge.store.quantized_values import quantize


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dim", [-1, -2])
def test_every_number_is_within_half_a_step_of_its_level(bits, dim):
    values = torch.randn(2, 3, 40, 24) * torch.rand(2, 3, 1, 24) * 30 + 5
    codes, scale, minimum = quantize(values, bits, dim)
    assert codes.dtype == torch.uint8 and scale.dtype == minimum.dtype == torch.float16
    assert int(codes.max()) == 2**bits - 1 and int(codes.min()) == 0
    exact = values.double()
    step = (exact.amax(dim, keepdim=True) - exact.amin(dim, keepdim=True)) / (2**bits - 1)
    rebuilt = minimum.double() + scale.double() * codes.double()
    rounding = 2**-11 * exact.abs().amax(dim, keepdim=True)  # of scale and minimum to float16
    assert bool(((rebuilt - exact).abs() <= 0.5 * step + 2 * rounding).all())


def test_numbers_on_the_grid_come_back():
    values = torch.randint(0, 16, (5, 32)) * 0.25 - 1.0
    values[:, 0], values[:, 1] = -1.0, 2.75
    codes, scale, minimum = quantize(values, 4, -1)
    assert torch.equal(minimum.float() + scale.float() * codes, values)


def test_a_constant_group_is_its_minimum():
    codes, scale, minimum = quantize(torch.full((2, 8), -1.5), 4, -1)
    assert not bool(codes.any()) and not bool(scale.any()) and torch.equal(minimum, torch.full((2, 1), -1.5).half())


def test_padding_has_no_part_in_the_grid():
    values, valid = torch.randn(1, 2, 12, 5), torch.ones(1, 1, 12, 1, dtype=torch.bool)
    valid[:, :, :4] = False
    values[:, :, :4] = 1e6
    masked, alone = quantize(values, 4, -2, valid), quantize(values[:, :, 4:], 4, -2)
    assert torch.equal(masked.codes[:, :, 4:], alone.codes)
    assert torch.equal(masked.scale, alone.scale) and torch.equal(masked.minimum, alone.minimum)
    nothing = quantize(values, 4, -2, torch.zeros_like(valid))
    assert bool(nothing.scale.isfinite().all()) and bool(nothing.minimum.isfinite().all())
