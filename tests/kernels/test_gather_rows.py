"""Rows that are gathered out of stored ones against the buffers' own rows."""

from __future__ import annotations

import pytest
import torch

from kvgauge.kernels.cpu.gather_rows import gather_rows, turned_rows
from kvgauge.store.buffers import GrowingBuffer
from kvgauge.store.quantized_rows import ChannelQuantizedRows, TokenQuantizedRows
from kvgauge.store.rotated_rows import RotatedRows

FORMS = {
    "token": lambda bits: TokenQuantizedRows(bits, 16),
    "balanced": lambda bits: TokenQuantizedRows(bits, 64, balance=True),
    "float32": lambda bits: GrowingBuffer(),
}


@pytest.mark.parametrize("chunk", [1, 8, 16, 23])
@pytest.mark.parametrize("tokens", [90, 96, 130])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", [0, 3])
def test_chunks_of_rows_that_heads_share_or_own(heads, form, bits, tokens, chunk):
    generator = torch.Generator().manual_seed(tokens + chunk)
    shape = (2, heads) if heads else (2,)
    buffer = FORMS[form](bits)
    buffer.set(torch.randn(*shape, tokens, 21, generator=generator))
    starts = torch.randint(0, tokens - chunk + 1, (2, 3, 4), generator=generator)
    starts[:, :, 0] = -(chunk // 2)
    starts[:, :, 1] = tokens - chunk
    actual = gather_rows(buffer.compiled()[0], starts, chunk)
    columns = (starts.unsqueeze(-1) + torch.arange(chunk)).flatten(2).clamp_min(0)
    dense = buffer.dense() if heads else buffer.dense()[:, None].expand(-1, 3, -1, -1)
    expected = dense.gather(2, columns.unsqueeze(-1).expand(-1, -1, -1, 21)).mT
    assert actual.shape == (2, 3, 21, 4 * chunk)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_all_rows_on_their_side(form):
    buffer = FORMS[form](8)
    buffer.set(torch.randn(2, 37, 12, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(turned_rows(buffer.compiled(4)[0], 2), buffer.dense().mT, rtol=1e-5, atol=1e-5)


def test_other_forms_are_left_to_torch():
    starts = torch.zeros(2, 1, 1, dtype=torch.int64)
    for made in (ChannelQuantizedRows(4, 16), RotatedRows(TokenQuantizedRows(4, 16), "hadamard")):
        made.set(torch.randn(2, 32, 8))
        assert gather_rows(made.compiled()[0], starts, 8) is None
