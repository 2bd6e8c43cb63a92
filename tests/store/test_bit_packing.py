import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from kvgauge.store.bit_packing import pack, packed_size, unpack


@given(bits=st.integers(1, 8), count=st.integers(1, 70), rows=st.integers(1, 5), seed=st.integers(0, 2**31 - 1))
def test_unpacking_gives_back_every_code(bits: int, count: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, rows, count), generator=generator).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, rows, packed_size(count, bits))
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize(("bits", "size"), [(1, 8), (2, 16), (3, 24), (4, 32), (8, 64)])
def test_packed_codes_take_their_bits_and_no_more(bits: int, size: int) -> None:
    assert packed_size(64, bits) == size
    packed = pack(torch.zeros(3, 64, dtype=torch.uint8), bits)
    assert packed.untyped_storage().nbytes() == 3 * size


def test_the_largest_codes_do_not_reach_into_their_neighbours() -> None:
    for bits in range(1, 9):
        codes = torch.zeros(16, dtype=torch.uint8)
        codes[7] = codes[8] = 2**bits - 1
        assert torch.equal(unpack(pack(codes, bits), bits, 16), codes)
