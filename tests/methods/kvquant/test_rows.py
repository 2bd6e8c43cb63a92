"""Coded rows against the dense formula in float64: nearest level on the grid, outliers as they were."""

from __future__ import annotations

import pytest
import torch

from kvgauge.architecture.planes import BLOCK
from kvgauge.methods.kvquant.grid import ChannelGrid, TokenGrid
from kvgauge.methods.kvquant.rows import CodedRows, PlainRows, coded_nbytes

WIDTH = 20


def samples(batch=2, tokens=BLOCK + 70):
    return torch.randn(batch, tokens, WIDTH) * torch.logspace(-2, 2, WIDTH)


def codebook(bits):
    return torch.cat([torch.tensor([-1.0, 1.0]), torch.rand(2**bits - 2) * 2 - 1]).sort().values


def read(rows):
    return torch.cat([block.clone() for _, block in rows.blocks()], dim=1)


def nearest(normalised, levels):
    distances = (normalised[..., None] - levels.double()).abs()
    return levels.double()[distances.argmin(-1)]


def channel_oracle(rows, low, high, levels, sparse):
    exact, low, high = rows.double(), low.double(), high.double()
    scale, zero = (high - low) / 2, (high + low) / 2
    coded = nearest((exact - zero) / scale, levels) * scale + zero
    outside = (exact < low) | (exact > high)
    return torch.where(outside, rows.half().double(), coded) if sparse else coded


def token_oracle(rows, share, levels):
    exact = rows.double()
    side = round(share * WIDTH / 2)
    result = torch.empty_like(exact)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in rows.shape[:2])).tolist():
        row = exact[tuple(index)]
        order = row.argsort()
        inner = order[side : WIDTH - side]
        low, high = row[inner].min(), row[inner].max()
        scale, zero = (((high - low) / 2).half().double(), ((high + low) / 2).half().double())
        coded = nearest((row - zero) / scale, levels) * scale + zero
        outer = torch.cat([order[:side], order[WIDTH - side :]])
        coded[outer] = row[outer].half().double()
        result[tuple(index)] = coded
    return result


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_keys_are_the_nearest_levels_of_their_channels(bits, sparse):
    rows, levels = samples(), codebook(bits)
    low, high = rows.flatten(0, 1).quantile(0.01, dim=0), rows.flatten(0, 1).quantile(0.99, dim=0)
    stored = CodedRows(ChannelGrid(low, high, sparse=sparse), levels, WIDTH, torch.float16)
    stored.append(rows)
    expected = channel_oracle(rows, low, high, levels, sparse)
    spread = (high - low).double()
    assert float(((read(stored) - expected) / spread).abs().max()) < 1e-3  # float16 of the outliers


@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_are_the_nearest_levels_of_their_tokens(bits, share):
    rows, levels = samples(tokens=50), codebook(bits)
    stored = CodedRows(TokenGrid(share, WIDTH), levels, WIDTH, torch.float16)
    stored.append(rows)
    error = (read(stored) - token_oracle(rows, share, levels)).abs().amax(-1)
    assert float((error / rows.abs().amax(-1)).max()) < 1e-3


def test_blocks_cover_all_tokens_in_order():
    rows = samples()
    stored = CodedRows(TokenGrid(0.0, WIDTH), codebook(4), WIDTH, torch.float16)
    for part in rows.split(300, dim=1):
        stored.append(part)
    starts = [(start, block.shape[1]) for start, block in stored.blocks()]
    assert starts == [(0, BLOCK), (BLOCK, 70)]
    whole = CodedRows(TokenGrid(0.0, WIDTH), stored.levels, WIDTH, torch.float16)
    whole.append(rows)
    assert torch.equal(read(stored), read(whole))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_bytes_are_predicted(bits, share):
    rows = samples(batch=1, tokens=100)
    for grid in (TokenGrid(share, WIDTH), ChannelGrid(-torch.ones(WIDTH), torch.ones(WIDTH), sparse=share > 0)):
        outliers = grid.measure(rows).outliers
        stored = CodedRows(grid, codebook(bits), WIDTH, torch.float16)
        stored.reserve(100)
        stored.append(rows)
        stored.trim()
        count = 0 if outliers is None else int(outliers.sum())
        assert sum(stored.nbytes_by_part().values()) == coded_nbytes(grid, bits, WIDTH, 100, count)


@pytest.mark.parametrize("coded", [True, False])
def test_crop_reorder_and_clear(coded):
    rows, levels = samples(tokens=30), codebook(4)
    stored, expected = (
        CodedRows(TokenGrid(0.1, WIDTH), levels, WIDTH, torch.float16) if coded else PlainRows() for _ in range(2)
    )
    stored.append(rows)
    stored.crop(12)
    stored.map_batch(lambda states: states[torch.tensor([1, 0])])
    expected.append(rows[[1, 0], :12])
    assert torch.equal(read(stored), read(expected))
    stored.clear()
    assert len(stored) == 0
    assert sum(stored.nbytes_by_part().values()) == 0


def test_a_token_without_spread_and_one_beyond_half_precision_stay_finite():
    rows = torch.stack([torch.full((WIDTH,), 3.0), torch.linspace(-1e6, 1e6, WIDTH)])[None]
    stored = CodedRows(TokenGrid(0.0, WIDTH), codebook(4), WIDTH, torch.float16)
    stored.append(rows)
    back = read(stored)
    assert bool(torch.isfinite(back).all())
    torch.testing.assert_close(back[0, 0], rows[0, 0], rtol=1e-3, atol=0)
