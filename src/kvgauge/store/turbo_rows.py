"""TurboQuant (arXiv 2504.19874): data-free codes of rotated directions, and a norm per row.

A row x is kept as its norm and the codes of ``y = (x / ‖x‖) R`` with a fixed random rotation R: every coordinate of y
is close to ``N(0, 1/d)``, so that one Lloyd–Max code book serves them all. ``mse`` spends all bits on these codes;
``prod`` leaves one to the residual ``r = y − ŷ``: the signs of ``r Sᵀ`` with a fixed Gaussian matrix S, and ‖r‖ (QJL).
Then ``√(π/2)/d · ‖r‖ · sign(r Sᵀ) S`` estimates r without bias in every inner product. At rates between two whole bits
the first half of the channels has the larger one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from kvgauge.kernels.cpu.stored_rows import StoredRows, coded_rows, repeated
from kvgauge.store.bit_packing import pack, packed_size, unpack
from kvgauge.store.lloyd_max import lloyd_max
from kvgauge.store.rotations import gaussian, rotation
from kvgauge.store.rows import BlockwiseRows
from kvgauge.store.tiles import TiledBuffer

WRITE = 1024  # tokens that are quantised at once

SIGN_LEVELS = torch.tensor([-1.0, 1.0])


def channel_bits(dimension: int, bits: float) -> list[tuple[int, int, int]]:
    """First channel, last one (exclusive) and bits of the runs of channels that a rate makes."""
    low = math.floor(bits)
    if low == bits:
        return [(0, dimension, low)]
    half = -(-dimension // 2)
    runs = [(0, half, low + 1), (half, dimension, low)]
    return [run for run in runs if run[1] > run[0]]


@cache
def code_book(dimension: int, bits: int) -> tuple[Tensor, Tensor]:
    """The levels of ``N(0, 1/d)``, as they are and as the kernels read them."""
    levels = lloyd_max(bits) / dimension**0.5
    return levels, repeated(levels)


@cache
def sign_levels() -> Tensor:
    """−1 and 1 as the kernels read them."""
    return repeated(SIGN_LEVELS)


@cache
def projection(dimension: int, kind: str, seed: int, *, signs: bool) -> Tensor:
    """What queries are asked with, (d, channels): the rotation R, and beside it ``R Sᵀ`` where there are signs."""
    turning = rotation(kind, dimension, seed)
    return torch.cat([turning, turning @ gaussian(dimension, seed).T], dim=1).contiguous() if signs else turning


class TurboRows(BlockwiseRows):
    """Rows as norms and codes of rotated directions.

    Args:
        bits: of a number, 2 to 4 in halves; with signs one of them is the sign.
        signs: ``prod``.
        kind, seed: of the rotation.
        dimension_major: `take` is given (…, dimension, tokens).
    """

    def __init__(
        self, bits: float, *, signs: bool, kind: str = "orthogonal", seed: int = 0, dimension_major: bool = False
    ) -> None:
        self.bits, self.signs, self.kind, self.seed = bits, signs, kind, seed
        self.dimension_major = dimension_major
        self.dtype = torch.float32
        self.dimension = 0
        self.norms, self.residual_norms, self.sign_codes = TiledBuffer(), TiledBuffer(), TiledBuffer()
        self.codes: list[TiledBuffer] = [TiledBuffer() for _ in range(1 if float(bits).is_integer() else 2)]

    @staticmethod
    def nbytes_of(tokens: int, dimension: int, bits: float, signs: bool) -> int:
        """Bytes of `tokens` rows of one head right after `set`."""
        runs = channel_bits(dimension, bits - signs)
        codes = sum(packed_size(last - first, own) for first, last, own in runs)
        return tokens * (codes + 2 + (packed_size(dimension, 1) + 2 if signs else 0))

    def runs(self) -> list[tuple[int, int, int]]:
        """As `channel_bits`, of the codes."""
        return channel_bits(self.dimension, self.bits - self.signs)

    def parts(self) -> list[TiledBuffer]:
        """Everything stored."""
        signs = [self.residual_norms, self.sign_codes] if self.signs else []
        return [self.norms, *self.codes, *signs]

    def set(self, rows: Tensor, valid: Tensor | None = None) -> None:
        self.clear()
        tokens = rows.shape[-2]
        self.reserve(tokens)
        for start in range(0, max(tokens, 1), WRITE):
            self.append(rows[..., start : start + WRITE, :])
        self.trim()

    def take(self, stored: Tensor, valid: Tensor | None = None) -> None:
        self.set(stored.mT if self.dimension_major else stored, valid)

    def append(self, rows: Tensor) -> None:
        self.dtype, self.dimension = rows.dtype, rows.shape[-1]
        exact = rows.float()
        norms = exact.norm(dim=-1, keepdim=True).half()
        turned = exact / norms.float().clamp_min(1e-6) @ rotation(self.kind, self.dimension, self.seed).to(rows.device)
        self.norms.append(norms)
        estimate = torch.empty_like(turned)
        for buffer, (first, last, bits) in zip(self.codes, self.runs(), strict=False):
            levels = code_book(self.dimension, bits)[0].to(rows.device)
            codes = torch.bucketize(turned[..., first:last].contiguous(), (levels[1:] + levels[:-1]) / 2)
            estimate[..., first:last] = levels[codes]
            buffer.append(pack(codes.to(torch.uint8), bits))
        if self.signs:
            residual = turned - estimate
            factor = math.sqrt(math.pi / 2) / self.dimension
            self.residual_norms.append((residual.norm(dim=-1, keepdim=True) * factor * norms.float()).half())
            seen = residual @ gaussian(self.dimension, self.seed).T.to(rows.device) > 0
            self.sign_codes.append(pack(seen.to(torch.uint8), 1))

    def reserve(self, tokens: int) -> None:
        for part in self.parts():
            part.reserve(tokens)

    def trim(self) -> None:
        for part in self.parts():
            part.trim()

    def crop(self, tokens: int) -> None:
        for part in self.parts():
            part.crop(tokens)

    def room(self) -> int:
        return min(part.room() for part in self.parts())

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        for part in self.parts():
            part.map_batch(select)

    def clear(self) -> None:
        for part in self.parts():
            part.clear()

    def __len__(self) -> int:
        return len(self.norms)

    def nbytes(self) -> int:
        return sum(part.nbytes() for part in self.parts())

    @property
    def device(self) -> torch.device:
        assert self.norms.stored is not None
        return self.norms.stored.device

    def shape(self) -> tuple[int, ...]:
        assert self.norms.stored is not None
        return (*self.norms.stored.shape[:-1], len(self), self.dimension)

    def write(self, start: int, stop: int, out: Tensor) -> None:
        runs = zip(self.codes, self.runs(), strict=False)
        parts = [
            code_book(self.dimension, bits)[0].to(out.device)[
                unpack(buffer.block(start, stop), bits, last - first).long()
            ]
            for buffer, (first, last, bits) in runs
        ]
        turned = torch.cat(parts, dim=-1) * self.norms.block(start, stop).float()
        if self.signs:
            signs = unpack(self.sign_codes.block(start, stop), 1, self.dimension).float() * 2 - 1
            sums = signs @ gaussian(self.dimension, self.seed).to(out.device)
            turned += sums * self.residual_norms.block(start, stop).float()
        out.copy_(turned @ rotation(self.kind, self.dimension, self.seed).T.to(out.device))

    def compiled(self, shared: int = 0) -> list[StoredRows] | None:
        if shared:
            return None
        pieces = [
            self._piece(buffer, self.norms, last - first, bits, code_book(self.dimension, bits)[1], first)
            for buffer, (first, last, bits) in zip(self.codes, self.runs(), strict=False)
        ]
        if self.signs:
            pieces.append(
                self._piece(self.sign_codes, self.residual_norms, self.dimension, 1, sign_levels(), self.dimension)
            )
        turning = projection(self.dimension, self.kind, self.seed, signs=self.signs)
        known = [piece.turned(turning) for piece in pieces if piece is not None]
        return known if len(known) == len(pieces) else None

    def _piece(
        self, codes: TiledBuffer, norms: TiledBuffer, dim: int, bits: int, levels: Tensor, beside: int
    ) -> StoredRows | None:
        assert codes.stored is not None and norms.stored is not None
        heads = [stored if stored.dim() == 3 else stored.unsqueeze(1) for stored in (codes.stored, norms.stored)]
        return coded_rows(
            heads[0],
            heads[1],
            slots=codes.slots,
            tokens=len(self),
            dim=dim,
            bits=bits,
            levels=levels,
            channel_groups=1,
            minima=False,
            beside=beside,
        )
