"""Rows in packed codes: what comes out, what it weighs, and everything a buffer must be able to do."""

from __future__ import annotations

import pytest
import torch

from kvgauge.errors import UserError
from kvgauge.store.half_rows import HalfRows
from kvgauge.store.quantized_rows import ChannelQuantizedRows, TokenQuantizedRows, groups_of
from kvgauge.store.storage import EXACT, QuantizedStorage

KINDS = {
    "token": lambda bits: TokenQuantizedRows(bits, 16),
    "balanced": lambda bits: TokenQuantizedRows(bits, 64, balance=True),
    "channel": lambda bits: ChannelQuantizedRows(bits, 32),
    "half": lambda bits: HalfRows(),
}


def rows(tokens, seed=0, shape=(2, 3), dimension=20):
    scale = torch.rand(dimension, generator=torch.Generator().manual_seed(9)) * 10 + 0.1  # of the channels
    return torch.randn(*shape, tokens, dimension, generator=torch.Generator().manual_seed(seed)) * scale


def filled(kind, bits, given, valid=None):
    buffer = KINDS[kind](bits)
    buffer.set(given, valid)
    return buffer


def error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_errors_fall_with_the_bits(kind):
    given = rows(150)
    errors = [error(filled(kind, bits, given).dense(), given) for bits in (2, 3, 4, 8)]
    if kind == "half":
        assert max(errors) < 2**-11
        return
    assert errors[0] > 1.7 * errors[1] > 1.7**2 * errors[2] > 1.7**3 * errors[3]
    assert errors[3] < 0.01


@pytest.mark.parametrize("tokens", [1, 31, 700, 1100])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dense_rows(kind, tokens):
    buffer = filled(kind, 4, rows(tokens))
    buffer.append(rows(45, seed=1))
    dense = buffer.dense().double()
    assert dense.shape == (2, 3, tokens + 45, 20) and len(buffer) == tokens + 45
    query, weights = torch.randn(2, 3, 6, 20), torch.rand(2, 3, 6, tokens + 45)
    assert error(buffer.dot(query), (query.double() @ dense.mT).float()) < 1e-5
    assert error(buffer.mix(weights), (weights.double() @ dense).float()) < 1e-5
    assert torch.equal(buffer.block(tokens // 2, tokens), buffer.dense()[..., tokens // 2 : tokens, :])


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_all_that_is_ever_dequantised(kind, monkeypatch):
    buffer = filled(kind, 4, rows(1500))
    made, write = [], type(buffer).write
    monkeypatch.setattr(
        type(buffer), "write", lambda self, start, stop, out: (made.append(stop - start), write(self, start, stop, out))
    )
    buffer.dot(torch.randn(2, 3, 1, 20))
    buffer.mix(torch.rand(2, 3, 1, 1500))
    assert sum(made) == 2 * 1500 and max(made) <= buffer.READ


def test_a_balanced_grid_serves_channels_of_any_size():
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(1, 2, 300, 24, generator=generator) * torch.logspace(-3, 2, 24)
    plain, balanced = TokenQuantizedRows(4, 64), TokenQuantizedRows(4, 64, balance=True)
    for buffer in (plain, balanced):
        buffer.set(given)

    def worst(buffer):
        return float(((buffer.dense() - given).norm(dim=2) / given.norm(dim=2)).max())

    assert worst(balanced) < 0.15 < worst(plain)
    more = torch.randn(1, 2, 9, 24, generator=generator) * torch.logspace(-3, 2, 24)
    balanced.append(more)
    assert error(balanced.block(300, 309) / torch.logspace(-3, 2, 24), more / torch.logspace(-3, 2, 24)) < 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    given, padding = rows(100, shape=(1, 3)), torch.full((1, 3, 23, 20), 50.0)
    valid = torch.ones(1, 123, dtype=torch.bool)
    valid[:, :23] = False
    alone, padded = filled(kind, 4, given), filled(kind, 4, torch.cat([padding, given], dim=2), valid)
    for buffer in (alone, padded):
        buffer.append(rows(40, seed=3, shape=(1, 3)))
    assert torch.equal(padded.dense()[:, :, 23:], alone.dense())


@pytest.mark.parametrize("tokens", [0, 3, 64, 130])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("balance", [True, False])
def test_bytes_are_foretold(tokens, bits, axis, balance):
    storage = QuantizedStorage(bits, axis, group=32, balance=balance)
    given = rows(tokens, dimension=44)
    for make, foretold in (
        (storage.rows, storage.rows_nbytes),
        (storage.kept, storage.kept_nbytes),
        (storage.factor, storage.factor_nbytes),
        (EXACT.rows, EXACT.rows_nbytes),
        (EXACT.kept, EXACT.kept_nbytes),
        (EXACT.factor, EXACT.factor_nbytes),
    ):
        buffer = make()
        buffer.set(given)
        assert buffer.nbytes() == 2 * 3 * foretold(tokens, 44, given.dtype)


def test_codes_are_packed():
    buffer = filled("token", 4, rows(512, dimension=64))
    assert buffer.codes.nbytes() == 2 * 3 * 512 * 64 // 2
    assert filled("channel", 2, rows(512, dimension=64)).codes.nbytes() == 2 * 3 * 512 * 64 // 4


def test_channels_wait_for_a_whole_group():
    buffer = filled("channel", 4, rows(40))
    more = rows(33, seed=5)
    for token in range(33):
        buffer.append(more[:, :, token : token + 1])
        assert len(buffer.residual) == (token + 1) % 32
    assert error(buffer.block(72, 73), more[:, :, 32:]) < 2**-11
    assert 2**-8 < error(buffer.block(40, 72), more[:, :, :32]) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_reordered(kind):
    buffer = filled(kind, 4, rows(70))
    buffer.append(rows(5, seed=1))
    before = buffer.dense()
    buffer.map_batch(lambda stored: stored[[1, 0, 1]])
    assert torch.equal(buffer.dense(), before[[1, 0, 1]])


@pytest.mark.parametrize("kind", KINDS)
def test_cropping_and_clearing(kind):
    buffer = filled(kind, 4, rows(70))
    before = buffer.dense()
    buffer.append(rows(20, seed=1))
    buffer.crop(70)
    assert torch.equal(buffer.dense(), before)
    buffer.append(rows(20, seed=2))
    assert len(buffer) == 90 and error(buffer.block(70, 90), rows(20, seed=2)) < 0.2
    buffer.clear()
    assert len(buffer) == buffer.nbytes() == 0


def test_a_group_of_tokens_is_not_taken_apart():
    buffer = filled("channel", 4, rows(70))  # groups of 6, 32 and 32 tokens
    buffer.crop(38)
    assert len(buffer) == 38
    buffer.append(rows(40, seed=1))
    assert error(buffer.block(38, 70), rows(40, seed=1)[:, :, :32]) < 0.1
    with pytest.raises(UserError, match="cannot crop into a group of 32 tokens"):
        buffer.crop(20)


def test_groups_are_few_and_alike():
    assert groups_of(64, 64) == [(0, 64)]
    assert groups_of(65, 64) == [(0, 32), (32, 65)]
    assert groups_of(10, 4) == [(0, 3), (3, 6), (6, 10)]


@pytest.mark.parametrize("kind", ["token", "balanced", "channel"])
def test_sixteen_bit_models(kind):
    given = rows(100).bfloat16()
    buffer = filled(kind, 8, given)
    assert buffer.dense().dtype == torch.bfloat16
    assert error(buffer.dense().float(), given.float()) < 0.01
    assert buffer.dot(torch.randn(2, 3, 4, 20).bfloat16()).dtype == torch.bfloat16
