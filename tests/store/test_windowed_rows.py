"""Exact windows behind codes, and rotations in front of them."""

from __future__ import annotations

import pytest
import torch

from kvgauge.errors import UserError
from kvgauge.store.half_rows import HalfRows
from kvgauge.store.storage import QuantizedStorage

FORMS = {
    "window": lambda suited: QuantizedStorage(4, None, 32, False, window=64),
    "rotated": lambda suited: QuantizedStorage(4, "token", 16, False, rotate="hadamard"),
    "both": lambda suited: QuantizedStorage(4, "token", 16, False, window=32, rotate="orthogonal"),
}
CASES = [(name, suited) for name in FORMS for suited in ("token", "channel")]


def rows(tokens, seed=0, dimension=20):
    scale = torch.rand(dimension, generator=torch.Generator().manual_seed(9)) * 10 + 0.1
    return torch.randn(2, 3, tokens, dimension, generator=torch.Generator().manual_seed(seed)) * scale


def filled(name, suited, given):
    buffer = FORMS[name](suited).rows(suited)
    buffer.set(given)
    return buffer


@pytest.mark.parametrize("tokens", [1, 31, 64, 700])
@pytest.mark.parametrize(("name", "suited"), CASES)
def test_products_and_bytes(name, suited, tokens):
    buffer = filled(name, suited, rows(tokens))
    assert buffer.nbytes() == 6 * FORMS[name](suited).rows_nbytes(tokens, 20, torch.float32, suited)
    for step in range(45):
        buffer.append(rows(1, seed=step + 1))
    dense = buffer.dense().double()
    assert len(buffer) == tokens + 45 and dense.shape == (2, 3, tokens + 45, 20)
    query, weights = torch.randn(2, 3, 6, 20), torch.rand(2, 3, 6, tokens + 45)
    torch.testing.assert_close(buffer.dot(query).double(), query.double() @ dense.mT, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(buffer.mix(weights).double(), weights.double() @ dense, rtol=1e-3, atol=1e-3)
    before = buffer.dense()
    buffer.map_batch(lambda stored: stored[[1, 0, 1]])
    assert torch.equal(buffer.dense(), before[[1, 0, 1]])


@pytest.mark.parametrize("suited", ["token", "channel"])
def test_the_window_is_exact_and_leaves_by_groups(suited):
    given = rows(200)
    buffer = filled("window", suited, given)
    assert len(buffer.recent) == 64
    for step in range(40):
        buffer.append(rows(1, seed=step + 1))
        assert 64 <= len(buffer.recent) < 96
    last = torch.cat([rows(1, seed=step + 1) for step in range(40)], dim=2)
    exact = HalfRows()
    exact.set(last)
    assert torch.equal(buffer.block(200, 240), exact.dense())
    with pytest.raises(UserError, match="cannot crop into tokens that have left the window of 64 exact tokens"):
        buffer.crop(100)
    buffer.crop(220)
    assert len(buffer) == 220 and torch.equal(buffer.block(200, 220), exact.dense()[:, :, :20])


def test_a_rotation_tames_a_channel_that_is_large_in_every_token():
    given = rows(300, dimension=64)
    given[..., 5] *= 40
    errors = []
    for rotate in (None, "hadamard"):
        buffer = QuantizedStorage(4, "token", 64, False, rotate=rotate).rows()
        buffer.set(given)
        others = torch.arange(64) != 5
        errors.append(float((buffer.dense() - given)[..., others].norm() / given[..., others].norm()))
    assert errors[1] < 0.5 * errors[0]
