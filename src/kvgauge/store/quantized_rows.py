"""Rows as packed codes: 8, 4, 3 or 2 bits a number, with a float16 scale and minimum per group.

A group is either a run of channels of one token (`TokenQuantizedRows`), which lets tokens come one at a time, or one
channel of a run of tokens (`ChannelQuantizedRows`), which suits keys: a few of their channels are large in every token
(KIVI, arXiv 2402.02750). Codes are packed along the channels in both, and stand in tiles of tokens
(`kvgauge.store.tiles`); so do the parameters of tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kvgauge.errors import UserError
from kvgauge.kernels.cpu.stored_rows import TILE, StoredRows, coded_rows, evenly_spaced
from kvgauge.store.bit_packing import pack, packed_size, unpack
from kvgauge.store.buffers import GrowingBuffer
from kvgauge.store.half_rows import HalfRows
from kvgauge.store.quantized_values import quantize
from kvgauge.store.rows import BlockwiseRows
from kvgauge.store.steps import Steps
from kvgauge.store.tiles import TiledBuffer

WRITE = 1024  # tokens that are quantised at once: temporary copies of a whole context would outweigh its codes


def groups_of(dimension: int, group: int) -> list[tuple[int, int]]:
    """First and last channel (exclusive) of as few groups of at most `group` channels as possible, sized alike."""
    count = -(-dimension // group)
    bounds = [dimension * index // count for index in range(count + 1)]
    return list(pairwise(bounds))


class QuantizedRows(BlockwiseRows):
    """What both kinds share: codes and parameters, and how a context is written in blocks.

    Args:
        bits: 2, 3, 4 or 8.
        group: numbers that share a scale and a minimum.
        dimension_major: `take` is given (…, dimension, tokens).
    """

    def __init__(self, bits: int, group: int, *, dimension_major: bool = False) -> None:
        self.bits, self.group, self.dimension_major = bits, group, dimension_major
        self.dtype = torch.float32
        self.dimension = 0
        self.codes = TiledBuffer()  # (…, tokens, packed dimension) uint8

    @abstractmethod
    def parts(self) -> Sequence[GrowingBuffer | TiledBuffer | HalfRows]:
        """Everything stored."""

    def take(self, stored: Tensor, valid: Tensor | None = None) -> None:
        self.set(stored.mT if self.dimension_major else stored, valid)

    def reserve(self, tokens: int) -> None:
        self.codes.reserve(tokens)

    def trim(self) -> None:
        for part in self.parts():
            part.trim()

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        for part in self.parts():
            part.map_batch(select)

    def clear(self) -> None:
        for part in self.parts():
            part.clear()

    def __len__(self) -> int:
        return len(self.codes)

    def nbytes(self) -> int:
        return sum(part.nbytes() for part in self.parts())

    @property
    def device(self) -> torch.device:
        assert self.codes.stored is not None
        return self.codes.stored.device

    def shape(self) -> tuple[int, ...]:
        assert self.codes.stored is not None
        return (*self.codes.stored.shape[:-1], len(self), self.dimension)

    def _coded(self, parameters: Tensor | None, shared: int, **form: Any) -> StoredRows | None:
        """The codes as compiled kernels read them; `form` as in `coded_rows`."""
        assert self.codes.stored is not None and parameters is not None
        return coded_rows(
            _with_heads(self.codes.stored, 3),
            parameters,
            slots=self.codes.slots,
            tokens=len(self.codes),
            dim=self.dimension,
            bits=self.bits,
            levels=evenly_spaced(self.bits),
            lead=self.codes.lead,
            shared=shared,
            **form,
        )

    def _know(self, rows: Tensor) -> None:
        self.dtype, self.dimension = rows.dtype, rows.shape[-1]

    def _unpacked(self, start: int, stop: int) -> Tensor:
        return unpack(self.codes.block(start, stop), self.bits, self.dimension)


class TokenQuantizedRows(QuantizedRows):
    """Groups of channels of one token.

    Args:
        bits, group, dimension_major: as in `QuantizedRows`; `group` counts channels.
        balance: divide every channel by its root mean square over the context first, so that channels of very different
            size, as the latents of a projection are, can share a grid. The float16 factors are kept per sequence, and
            serve the tokens that come later as well.
    """

    def __init__(self, bits: int, group: int, *, balance: bool = False, dimension_major: bool = False) -> None:
        super().__init__(bits, group, dimension_major=dimension_major)
        self.balance = balance
        self.parameters = TiledBuffer()  # (…, tokens, 2 · groups) float16: scales, then minima
        self.balances = GrowingBuffer(step=1)  # (…, 1, dimension) float16; empty where there are none

    @staticmethod
    def nbytes_of(tokens: int, dimension: int, bits: int, group: int, balance: bool) -> int:
        """Bytes of `tokens` rows of one head right after `set`."""
        per_token = packed_size(dimension, bits) + 4 * len(groups_of(dimension, group))
        return tokens * per_token + (2 * dimension if balance and tokens else 0)

    def parts(self) -> Sequence[GrowingBuffer | TiledBuffer]:
        return (self.codes, self.parameters, self.balances)

    def set(self, rows: Tensor, valid: Tensor | None = None) -> None:
        self.clear()
        tokens = rows.shape[-2]
        if self.balance and tokens:
            self.balances.set(_root_mean_square(rows, valid))
        self.codes.reserve(tokens)
        self.parameters.reserve(tokens)
        for start in range(0, max(tokens, 1), WRITE):
            self.append(rows[..., start : start + WRITE, :])
        self.trim()

    def append(self, rows: Tensor) -> None:
        self._know(rows)
        scale = self.channel_scale(torch.float32)
        rows = rows if scale is None else rows.float() / scale
        parts = [
            quantize(rows[..., first:last], self.bits, -1) for first, last in groups_of(self.dimension, self.group)
        ]
        self.codes.append(pack(torch.cat([part.codes for part in parts], dim=-1), self.bits))
        self.parameters.append(torch.cat([part.scale for part in parts] + [part.minimum for part in parts], dim=-1))

    def fix(self, steps: Steps) -> None:
        for part in (self.codes, self.parameters):
            part.fix(steps)

    def release(self, steps: Steps) -> None:
        for part in (self.codes, self.parameters):
            part.release(steps)

    def crop(self, tokens: int) -> None:
        self.codes.crop(tokens)
        self.parameters.crop(tokens)

    def room(self) -> int:
        return min(self.codes.room(), self.parameters.room())

    def channel_scale(self, dtype: torch.dtype) -> Tensor | None:
        return self.balances.view().to(dtype) if len(self.balances) else None

    def compiled(self, shared: int = 0) -> list[StoredRows] | None:
        balance = _with_heads(self.balances.view(), 4) if len(self.balances) else None
        groups, parameters = len(groups_of(self.dimension, self.group)), self.parameters.stored
        own = None if parameters is None else _with_heads(parameters, 3)
        coded = self._coded(own, shared, balance=balance, channel_groups=groups)
        return None if coded is None else [coded]

    def write(self, start: int, stop: int, out: Tensor) -> None:
        out.copy_(self._unpacked(start, stop))
        parameters = self.parameters.block(start, stop).to(out.dtype)
        groups = groups_of(self.dimension, self.group)
        for index, (first, last) in enumerate(groups):
            scale, minimum = (parameters[..., place : place + 1] for place in (index, len(groups) + index))
            out[..., first:last].mul_(scale).add_(minimum)


class ChannelQuantizedRows(QuantizedRows):
    """One channel of a run of tokens.

    The groups are aligned at the end of the context, so that left padding does not move them; its first group may be
    shorter than the others. Tokens that come later stay in 16 bits until a group of them is full.

    Args:
        bits, group, dimension_major: as in `QuantizedRows`; `group` counts tokens.
    """

    def __init__(self, bits: int, group: int, *, dimension_major: bool = False) -> None:
        super().__init__(bits, group, dimension_major=dimension_major)
        self.parameters = GrowingBuffer(step=1)  # (…, groups, 2 · dimension) float16
        self.residual = HalfRows()
        self.missing = 0  # tokens that the first group is short of

    @staticmethod
    def nbytes_of(tokens: int, dimension: int, bits: int, group: int) -> int:
        """Bytes of `tokens` rows of one head right after `set`."""
        missing = -tokens % group
        return (missing % TILE + tokens) * packed_size(dimension, bits) + -(-tokens // group) * 4 * dimension

    @property
    def together(self) -> int:
        return self.group

    def parts(self) -> Sequence[GrowingBuffer | TiledBuffer | HalfRows]:
        return (self.codes, self.parameters, self.residual)

    def __len__(self) -> int:
        return len(self.codes) + len(self.residual)

    @property
    def device(self) -> torch.device:
        return super().device if len(self.codes) else self.residual.device

    def shape(self) -> tuple[int, ...]:
        return super().shape() if len(self.codes) else self.residual.shape()

    def set(self, rows: Tensor, valid: Tensor | None = None) -> None:
        self.clear()
        self._know(rows)
        tokens = rows.shape[-2]
        if not tokens:
            self.residual.set(rows)
            return
        self.missing = -tokens % self.group
        self.codes.begin(self.missing % TILE)  # tiles then begin where groups do
        self.codes.reserve(tokens)
        self.parameters.reserve(-(-tokens // self.group))
        first, step = self.group - self.missing, max(1, WRITE // self.group) * self.group
        starts = [0, *range(first, tokens, step)]
        for start, stop in zip(starts, [*starts[1:], tokens], strict=True):
            self._quantize(rows[..., start:stop, :], None if valid is None else valid[:, start:stop])
        self.trim()

    def append(self, rows: Tensor) -> None:
        self._know(rows)
        self.residual.append(rows)
        full = len(self.residual) // self.group * self.group
        if full:
            self._quantize(self.residual.drop_front(full), None)

    def crop(self, tokens: int) -> None:
        quantized = len(self.codes)
        self.residual.crop(max(0, tokens - quantized))
        if tokens >= quantized:
            return
        if (tokens + self.missing) % self.group:
            raise UserError(
                f"cannot crop into a group of {self.group} tokens that are quantised together: "
                f"use axis: token or start a new cache"
            )
        self.codes.crop(tokens)
        self.parameters.crop((tokens + self.missing) // self.group)

    def room(self) -> int:
        return min(self.residual.room(), self.group - 1 - len(self.residual))

    def compiled(self, shared: int = 0) -> list[StoredRows] | None:
        residual = self.residual.compiled() if len(self.residual) else []
        if not len(self.codes) or residual is None:
            return residual
        parameters = _with_heads(self.parameters.view(), 4)
        coded = self._coded(parameters, shared, token_group=self.group, missing=self.missing)
        return None if coded is None else [coded, *residual]

    def write(self, start: int, stop: int, out: Tensor) -> None:
        quantized = len(self.codes)
        middle = min(stop, quantized)
        if start < middle:
            coded = out[..., : middle - start, :]
            coded.copy_(self._unpacked(start, middle))
            group = torch.arange(start + self.missing, middle + self.missing, device=out.device) // self.group
            of_groups = self.parameters.view().to(out.dtype)
            scale, minimum = of_groups.split(self.dimension, dim=-1)
            coded.mul_(scale.index_select(-2, group)).add_(minimum.index_select(-2, group))
        if stop > quantized:
            behind = max(start, quantized)
            self.residual.write(behind - quantized, stop - quantized, out[..., behind - start :, :])

    def _quantize(self, rows: Tensor, valid: Tensor | None) -> None:
        """Add whole groups, or the context's first and shorter one."""
        size = min(self.group, rows.shape[-2])
        grouped = rows.unflatten(-2, (-1, size))
        seen = None
        if valid is not None:
            seen = valid.unflatten(1, (-1, size)).unsqueeze(-1)
            seen = seen.view(seen.shape[0], *([1] * (grouped.dim() - seen.dim())), *seen.shape[1:])
        codes, scale, minimum = quantize(grouped, self.bits, -2, seen)
        self.codes.append(pack(codes.flatten(-3, -2), self.bits))
        self.parameters.append(torch.cat([scale, minimum], dim=-1).squeeze(-2))


def _with_heads(stored: Tensor, dimensions: int) -> Tensor:
    """A view with the dimension of the heads, which rows that all of them share do not have."""
    return stored if stored.dim() == dimensions else stored.unsqueeze(1)


def _root_mean_square(rows: Tensor, valid: Tensor | None) -> Tensor:
    """(…, 1, dimension) float16 over the valid tokens; 1 for channels that are zero."""
    tokens = rows.shape[-2]
    total = torch.zeros(*rows.shape[:-2], 1, rows.shape[-1], device=rows.device)
    for start in range(0, tokens, WRITE):
        part = rows[..., start : start + WRITE, :].float().square()
        if valid is not None:
            seen = valid[:, start : start + WRITE]
            part = part * seen.view(seen.shape[0], *([1] * (rows.dim() - 3)), seen.shape[1], 1)
        total += part.sum(dim=-2, keepdim=True)
    count: Tensor | int = tokens
    if valid is not None:
        count = valid[:, :tokens].sum(dim=1).clamp_min(1).view(-1, *([1] * (rows.dim() - 1)))
    root = (total / count).sqrt().half()
    return torch.where(root > 0, root, 1.0).half()
