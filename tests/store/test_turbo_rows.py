"""TurboQuant's rows: distortions of the code books, inner products without bias, bytes, and what a buffer must do."""

from __future__ import annotations

import pytest
import torch

from kvgauge.store.lloyd_max import lloyd_max
from kvgauge.store.rotations import rotation
from kvgauge.store.turbo_rows import TurboRows

# Of a standard normal number (Max, 1960); TurboQuant's table gives them as 0.36, 0.117, 0.03 and 0.009.
DISTORTIONS = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


def unit_rows(tokens, dimension, seed=0):
    rows = torch.randn(1, 1, tokens, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (rows / rows.norm(dim=-1, keepdim=True)).float()


@pytest.mark.parametrize("bits", DISTORTIONS)
def test_code_books_have_the_published_distortion(bits):
    """By numerical integration of the density, in float64."""
    x = torch.linspace(-9, 9, 400001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / (2 * torch.pi) ** 0.5
    levels = lloyd_max(bits).double()
    nearest = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
    distortion = float(torch.trapezoid((x - nearest).square() * density, x))
    assert abs(distortion - DISTORTIONS[bits]) < 1e-3 * DISTORTIONS[bits]
    assert torch.allclose(levels, -levels.flip(0), atol=1e-6)


@pytest.mark.parametrize("kind", ["orthogonal", "hadamard"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_of_unit_rows_are_the_published_ones(bits, kind):
    given = unit_rows(4000, 128)
    buffer = TurboRows(bits, signs=False, kind=kind)
    buffer.set(given)
    error = float((buffer.dense() - given).square().sum(dim=-1).mean())
    assert abs(error - DISTORTIONS[bits]) < 0.05 * DISTORTIONS[bits]


def test_half_a_bit_lies_between():
    given = unit_rows(2000, 64)
    errors = []
    for bits in (2, 2.5, 3, 3.5, 4):
        buffer = TurboRows(bits, signs=False)
        buffer.set(given)
        errors.append(float((buffer.dense() - given).square().sum(dim=-1).mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] == pytest.approx((errors[0] + errors[2]) / 2, rel=0.05)


@pytest.mark.parametrize("bits", [2, 3])
def test_inner_products_of_prod_have_no_bias_and_those_of_mse_shrink(bits):
    """One pair of a row and a query, over many draws of the rotation and of the projection."""
    row, query = unit_rows(1, 32, seed=1), unit_rows(1, 32, seed=2)
    query = (row + query) / (row + query).norm()
    exact = float((row * query).sum())
    means, spreads = {}, {}
    for signs in (True, False):
        found = []
        for seed in range(0, 1200, 2):
            buffer = TurboRows(bits, signs=signs, seed=seed)
            buffer.set(row)
            found.append(float(buffer.dot(query)))
        means[signs] = sum(found) / len(found) - exact
        spreads[signs] = torch.tensor(found).std() / len(found) ** 0.5
    assert abs(means[True]) < 3.5 * spreads[True]
    assert means[False] < -6 * spreads[False], "a code book of the smallest error shrinks what it stands for"


@pytest.mark.parametrize("dimension", [7, 20, 64])
@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("bits", [2, 2.5, 3, 3.5, 4])
def test_products_bytes_and_operations_of_a_buffer(bits, signs, dimension):
    generator = torch.Generator().manual_seed(3)
    given = torch.randn(2, 3, 70, dimension, generator=generator)
    buffer = TurboRows(bits, signs=signs)
    buffer.set(given)
    assert buffer.nbytes() == 2 * 3 * TurboRows.nbytes_of(70, dimension, bits, signs)
    first = buffer.dense()
    buffer.append(torch.randn(2, 3, 5, dimension, generator=generator))
    dense = buffer.dense().double()
    assert len(buffer) == 75 and torch.equal(buffer.dense()[:, :, :70], first)
    query, weights = torch.randn(2, 3, 4, dimension), torch.rand(2, 3, 4, 75)
    torch.testing.assert_close(buffer.dot(query).double(), query.double() @ dense.mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(buffer.mix(weights).double(), weights.double() @ dense, rtol=1e-4, atol=1e-4)
    buffer.crop(70)
    assert torch.equal(buffer.dense(), first)
    buffer.map_batch(lambda stored: stored[[1, 0, 1]])
    assert torch.equal(buffer.dense(), first[[1, 0, 1]])
    buffer.clear()
    assert len(buffer) == buffer.nbytes() == 0


@pytest.mark.parametrize("kind", ["orthogonal", "hadamard"])
@pytest.mark.parametrize("dimension", [1, 6, 16, 51])
def test_rotations_are_orthogonal_and_drawn_from_their_seed(kind, dimension):
    matrix = rotation(kind, dimension, 4)
    torch.testing.assert_close(matrix.double() @ matrix.double().T, torch.eye(dimension, dtype=torch.float64))
    assert torch.equal(matrix, rotation.__wrapped__(kind, dimension, 4))
    assert dimension < 6 or not torch.equal(matrix, rotation(kind, dimension, 5))
