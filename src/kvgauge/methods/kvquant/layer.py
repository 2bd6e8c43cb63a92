"""KVQuant's storage (arXiv 2401.18079): keys and values as packed codes, asked block by block.

Keys are coded per channel before the rotation. A block of tokens is decoded into a workspace, rotated, scored and
forgotten before the next one, so that no more than a block of keys or values exists at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvgauge.architecture.planes import BLOCK, PlaneRotation, from_planes, interleaved, planes_of, to_planes
from kvgauge.attend.attention import segmented_attention
from kvgauge.attend.mask import Mask
from kvgauge.layers.cache import KVCache
from kvgauge.layers.sinks import ExactSinks
from kvgauge.layers.two_phase import TwoPhaseLayer
from kvgauge.methods.kvquant.grid import Grid
from kvgauge.methods.kvquant.layout import heads_of, key_rows, rotated_heads, value_rows
from kvgauge.methods.kvquant.rows import CodedRows, PlainRows, Rows, coded_nbytes
from kvgauge.store.rows import RowBuffer

EXACT_BITS = 16  # the quantiser switched off: numbers stay in the model's dtype


@dataclass(frozen=True)
class LayerQuantiser:
    """What one layer's codes mean.

    Attributes:
        keys, values: their grids.
        key_levels, value_levels: (2 ** bits,) for every number of bits.
        rotation: keys are coded before it; None codes them as they are cached.
        sinks: first tokens that stay exact.
        outlier_dtype: 16-bit type of kept entries.
    """

    keys: Grid
    values: Grid
    key_levels: Mapping[int, Tensor]
    value_levels: Mapping[int, Tensor]
    rotation: PlaneRotation | None
    sinks: int
    outlier_dtype: torch.dtype

    def new_rows(self, bits: int, width: int) -> tuple[Rows, Rows]:
        """Empty storage of keys and of values."""
        if bits == EXACT_BITS:
            return PlainRows(), PlainRows()
        keys = CodedRows(self.keys, self.key_levels[bits], width, self.outlier_dtype)
        return keys, CodedRows(self.values, self.value_levels[bits], width, self.outlier_dtype)

    def nbytes(self) -> int:
        levels = sum(tensor.nbytes for levels in (self.key_levels, self.value_levels) for tensor in levels.values())
        return self.keys.nbytes() + self.values.nbytes() + levels


@dataclass
class CodedSegment:
    """Coded keys and values as a segment of attention.

    Attributes:
        keys, values: stored rows.
        num_key_value_heads: N.
        rotation: of the keys; None where they were coded behind it.
        first: position of the first token of every sequence, (batch, 1).
    """

    keys: Rows
    values: Rows
    num_key_value_heads: int
    rotation: PlaneRotation | None
    first: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def scores(self, query: Tensor) -> Tensor:
        """See `kvgauge.attend.attention.Segment`."""
        scores = query.new_empty(*query.shape[:3], len(self))
        asking = query.float() if self.rotation is None else to_planes(query)
        for start, block in self.keys.blocks():
            stop = start + block.shape[1]
            if self.rotation is None:
                keys, asked = heads_of(block, self.num_key_value_heads), asking
            else:
                # The query is turned back to the block's first position, which leaves the keys the offsets behind it.
                back = self.rotation.phases(self.first + start).conj()  # (batch, 1, head_dim / 2)
                asked = interleaved(asking * back.unsqueeze(1))
                phases = self.rotation.offsets(stop - start, block.device)
                keys = rotated_heads(block, self.num_key_value_heads, phases)
            scores[..., start:stop] = asked @ keys.mT
        return scores

    def mix(self, weights: Tensor) -> Tensor:
        """See `kvgauge.attend.attention.Segment`."""
        mixed: Tensor | None = None
        for start, block in self.values.blocks():
            share = weights[..., start : start + block.shape[1]].float()
            part = share @ heads_of(block, self.num_key_value_heads)
            mixed = part if mixed is None else mixed.add_(part)
        assert mixed is not None
        return mixed.to(weights.dtype)

    def dense(self) -> tuple[Tensor, Tensor]:
        """(keys, values) as attention sees them, (batch, N, tokens, head_dim), float32."""
        heads = self.num_key_value_heads
        values = [heads_of(block, heads).clone() for _, block in self.values.blocks()]
        keys = []
        for start, block in self.keys.blocks():
            if self.rotation is None:
                keys.append(heads_of(block, heads).clone())
                continue
            columns = torch.arange(start, start + block.shape[1], device=block.device)
            turned = rotated_heads(block, heads, self.rotation.phases(self.first + columns))
            keys.append(from_planes(planes_of(turned)))
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)


class KVQuantLayer(TwoPhaseLayer):
    """One layer of codes, behind exact first tokens.

    Args:
        quantiser: of this layer.
        bits: of a code, or `EXACT_BITS`; None until the cache has chosen (`choose`).
    """

    def __init__(self, quantiser: LayerQuantiser, bits: int | None) -> None:
        super().__init__()
        self.quantiser, self.bits = quantiser, bits
        self.num_heads = 0  # kv-heads, known with the first tokens
        self.key_rows: Rows = PlainRows()
        self.value_rows: Rows = PlainRows()
        self.sinks = ExactSinks(quantiser.sinks, grows=True)
        self.shift: Tensor | None = None  # (batch, 1): what a column lacks to be a position, 0 or below

    # -- storing -------------------------------------------------------------------------------------------------

    def store(self, keys: Tensor, values: Tensor) -> None:
        assert self.bits is not None
        tokens = keys.shape[2]
        self.num_heads = keys.shape[1]
        self.shift = self._shift(keys)
        self.key_rows, self.value_rows = self.quantiser.new_rows(self.bits, keys.shape[1] * keys.shape[3])
        self.sinks.take(keys, values, self.valid)
        first = self.sinks.cut
        for rows in (self.key_rows, self.value_rows):
            rows.reserve(tokens - first)
        for start in range(first, tokens, BLOCK):
            stop = min(start + BLOCK, tokens)
            self._code(keys[:, :, start:stop], values[:, :, start:stop], start)
        for rows in (self.key_rows, self.value_rows):
            rows.trim()

    def _shift(self, keys: Tensor) -> Tensor:
        positions = self.cache.positions if self.cache is not None else None
        if positions is None or not positions.shape[1]:
            return torch.zeros(keys.shape[0], 1, dtype=torch.long, device=keys.device)
        return (positions[:, -1:].to(keys.device) - (positions.shape[1] - 1)).expand(keys.shape[0], 1)

    def _code(self, keys: Tensor, values: Tensor, column: int) -> None:
        """Add tokens, the first at `column`."""
        self.key_rows.append(self._key_rows(keys, column))
        self.value_rows.append(value_rows(values))

    def _key_rows(self, keys: Tensor, column: int) -> Tensor:
        assert self.shift is not None
        columns = torch.arange(column, column + keys.shape[2], device=keys.device)
        return key_rows(keys, self.shift + columns, self.quantiser.rotation)

    def append(self, keys: Tensor, values: Tensor) -> None:
        column = self.logical_length - keys.shape[2]
        room = self.sinks.grow(keys, values, column)
        if room < keys.shape[2]:
            self._code(keys[:, :, room:], values[:, :, room:], column + room)

    def compress_again(self) -> None:
        """New tokens are coded as they come."""
        for rows in (self.key_rows, self.value_rows):
            rows.trim()

    # -- attending -----------------------------------------------------------------------------------------------

    def attend_compressed(self, query: Tensor, mask: Mask, scaling: float) -> Tensor:
        mask = self.sinks.mask(mask, query.shape[2], self.logical_length)
        return segmented_attention(query, [*self.sinks.segments(), self._coded()], mask, scaling)

    def _coded(self) -> CodedSegment:
        assert self.shift is not None
        first = self.shift + self.sinks.cut
        return CodedSegment(self.key_rows, self.value_rows, self.num_heads, self.quantiser.rotation, first)

    # -- the contract --------------------------------------------------------------------------------------------

    def outliers(self) -> int:
        """Entries of the exact context that would be kept beside the codes, of all sequences."""
        keys, values = self.exact_keys.view(), self.exact_values.view()
        self.shift = self._shift(keys)
        padded = self.valid is not None
        first = 0 if padded else min(self.quantiser.sinks, keys.shape[2])
        count = 0
        for grid, states in ((self.quantiser.keys, keys), (self.quantiser.values, values)):
            if not grid.sparse:
                continue
            for start in range(first, keys.shape[2], BLOCK):
                part = states[:, :, start : min(start + BLOCK, keys.shape[2])]
                rows = self._key_rows(part, start) if states is keys else value_rows(part)
                chosen = grid.measure(rows.float()).outliers
                count += 0 if chosen is None else int(chosen.sum())
        return count

    def coded_nbytes(self, bits: int, outliers: int) -> int:
        """Bytes that `compress` would leave at this number of bits, of all sequences."""
        keys = self.exact_keys.view()
        batch, heads, tokens, head_dim = keys.shape
        sinks = min(self.quantiser.sinks, tokens)
        padded = self.valid is not None
        exact = 2 * batch * heads * sinks * head_dim * keys.element_size()
        rows = batch * (tokens if padded else tokens - sinks)
        grids = (self.quantiser.keys, self.quantiser.values)
        codes = sum(coded_nbytes(grid, bits, heads * head_dim, rows, 0) for grid in grids)
        return exact + codes + coded_nbytes(grids[0], bits, heads * head_dim, 0, outliers)

    def compressed_nbytes_by_part(self) -> dict[str, int]:
        keys, values = self.key_rows.nbytes_by_part(), self.value_rows.nbytes_by_part()
        parts = {part: size + values[part] for part, size in keys.items()} | {"sinks": self.sinks.nbytes()}
        return {part: size for part, size in parts.items() if size}

    def fixed_nbytes(self) -> int:
        rotation = self.quantiser.rotation
        shared = rotation.nbytes() if rotation is not None and self.index == 0 else 0
        return self.quantiser.nbytes() + shared

    def compressed_dense(self) -> tuple[Tensor, Tensor]:
        if not len(self.key_rows):
            return self.sinks.keys.dense(), self.sinks.values.dense()
        keys, values = (states.to(self.dtype) for states in self._coded().dense())
        return self.sinks.restored(keys, values)

    def buffers(self) -> Sequence[RowBuffer]:
        return self.sinks.buffers

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        super().map_batch(select)
        self.key_rows.map_batch(select)
        self.value_rows.map_batch(select)
        self.shift = None if self.shift is None else select(self.shift)
        self.sinks.map_columns(select)

    def crop_compressed(self, tokens: int) -> None:
        self.sinks.crop(tokens)
        sinks = self.sinks.cut
        self.key_rows.crop(tokens - sinks)
        self.value_rows.crop(tokens - sinks)

    def reset(self) -> None:
        super().reset()
        self.key_rows.clear()
        self.value_rows.clear()
        self.shift = None


ChooseBits = Callable[[Callable[[int], int], int], int]  # (bytes at a number of bits, tokens of the batch) → bits


class KVQuantCache(KVCache):
    """A cache whose layers share a number of bits, chosen from the real bytes of its context.

    Args:
        layers: of the model.
        choose: the number of bits from what each would take, in bytes, and the tokens of all sequences; None where the
            layers know it.
        context_length: as in `KVCache`.
    """

    def __init__(
        self, layers: Sequence[KVQuantLayer], choose: ChooseBits | None = None, *, context_length: int | None = None
    ) -> None:
        super().__init__(layers, context_length=context_length)
        self.choose = choose

    def compress_layers(self) -> None:
        if self.choose is not None:
            outliers = [layer.outliers() for layer in self.own]
            tokens = self.get_seq_length() * self.own[0].exact_keys.view().shape[0]

            def nbytes(bits: int) -> int:
                pairs = zip(self.own, outliers, strict=True)
                return sum(layer.coded_nbytes(bits, count) for layer, count in pairs)

            bits = self.choose(nbytes, tokens)
            for layer in self.own:
                layer.bits = bits
        super().compress_layers()
