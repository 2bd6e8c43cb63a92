"""KVQuant's storage (arXiv 2401.18079): keys and values as packed codes, asked block by block.

Keys are coded per channel before the rotation. A block of tokens is decoded into a workspace, rotated, scored and
forgotten before the next one, so that no more than a block of keys or values exists at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvgauge.caches.attention import Segment, causal_mask, segmented_attention
from kvgauge.caches.base import KVCache, LayerCache
from kvgauge.caches.buffers import GrowingBuffer
from kvgauge.caches.exact import ExactSegment
from kvgauge.caches.kvquant_grid import Grid
from kvgauge.caches.kvquant_layout import heads_of, key_rows, rotated_heads, value_rows
from kvgauge.caches.kvquant_rows import CodedRows, PlainRows, Rows, coded_nbytes
from kvgauge.caches.rotation import BLOCK, PlaneRotation, from_planes, interleaved, planes_of, to_planes
from kvgauge.errors import UserError

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
        """See `kvgauge.caches.attention.Segment`."""
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
        """See `kvgauge.caches.attention.Segment`."""
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


class KVQuantLayer(LayerCache):
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
        self.sink_keys, self.sink_values = GrowingBuffer(step=1), GrowingBuffer(step=1)
        self.sink_columns: Tensor | None = None  # (batch, sinks): where each row's sinks stand, if rows are padded
        self.context = 0  # tokens that were compressed, padding included
        self.shift: Tensor | None = None  # (batch, 1): what a column lacks to be a position, 0 or below

    # -- storing -------------------------------------------------------------------------------------------------

    def store(self, keys: Tensor, values: Tensor) -> None:
        assert self.bits is not None
        self.context = tokens = keys.shape[2]
        self.num_heads = keys.shape[1]
        self.shift = self._shift(keys)
        self.key_rows, self.value_rows = self.quantiser.new_rows(self.bits, keys.shape[1] * keys.shape[3])
        first = self._take_sinks(keys, values)
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
        return (positions[:, -1:] - (positions.shape[1] - 1)).expand(keys.shape[0], 1)

    def _code(self, keys: Tensor, values: Tensor, column: int) -> None:
        """Add tokens, the first at `column`."""
        self.key_rows.append(self._key_rows(keys, column))
        self.value_rows.append(value_rows(values))

    def _key_rows(self, keys: Tensor, column: int) -> Tensor:
        assert self.shift is not None
        columns = torch.arange(column, column + keys.shape[2], device=keys.device)
        return key_rows(keys, self.shift + columns, self.quantiser.rotation)

    def _take_sinks(self, keys: Tensor, values: Tensor) -> int:
        """Copy the exact sinks; the column at which the codes start."""
        tokens = keys.shape[2]
        sinks = min(self.quantiser.sinks, tokens)
        valid = self.cache.valid if self.cache is not None else None
        self.sink_columns = None
        if not sinks:
            return 0
        if valid is None:
            self.sink_keys.set(keys[:, :, :sinks])
            self.sink_values.set(values[:, :, :sinks])
            return sinks
        # Every row's sinks are its own first tokens, behind its padding: they are gathered, and the codes keep all
        # columns, of which the mask hides the sinks.
        first = valid.int().argmax(dim=1, keepdim=True)
        self.sink_columns = first + torch.arange(sinks, device=keys.device)
        index = self._sink_index(keys)
        self.sink_keys.set(keys.gather(2, index))
        self.sink_values.set(values.gather(2, index))
        return 0

    def _sink_index(self, states: Tensor) -> Tensor:
        assert self.sink_columns is not None
        columns = self.sink_columns.clamp(max=self.context - 1)
        return columns[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])

    def append(self, keys: Tensor, values: Tensor) -> None:
        column = self.logical_length - keys.shape[2]
        room = 0 if self.sink_columns is not None else max(0, min(self.quantiser.sinks - column, keys.shape[2]))
        if room:  # the context was shorter than the sinks
            self.sink_keys.append(keys[:, :, :room])
            self.sink_values.append(values[:, :, :room])
        if room < keys.shape[2]:
            self._code(keys[:, :, room:], values[:, :, room:], column + room)

    # -- attending -----------------------------------------------------------------------------------------------

    def attend_compressed(self, query: Tensor, attention_mask: Tensor | None, scaling: float) -> Tensor:
        if self.sink_columns is not None:
            attention_mask = self._mask_of_gathered_sinks(query, attention_mask)
        return segmented_attention(query, self._segments(), attention_mask, scaling)

    def _mask_of_gathered_sinks(self, query: Tensor, mask: Tensor | None) -> Tensor:
        """The mask in the order of the segments: sinks first, and hidden among the codes."""
        assert self.sink_columns is not None
        batch, _, queries, _ = query.shape
        if mask is None:
            mask = causal_mask(queries, self.logical_length, query.device)
        mask = mask.expand(batch, 1, queries, -1)
        # A row of fewer tokens than sinks has columns behind the context: they are no sinks.
        columns = self.sink_columns[:, None, None, :].expand(-1, 1, queries, -1)
        context = self.context
        sinks = mask.gather(3, columns.clamp(max=context - 1)) & (columns < context)
        return torch.cat([sinks, mask.scatter(3, columns.clamp(max=context - 1), False)], dim=3)

    def _segments(self) -> list[Segment]:
        segments: list[Segment] = []
        if len(self.sink_keys):
            segments.append(ExactSegment(self.sink_keys.view(), self.sink_values.view()))
        if len(self.key_rows):
            segments.append(self._coded())
        return segments

    def _coded(self) -> CodedSegment:
        assert self.shift is not None
        first = self.shift + (0 if self.sink_columns is not None else len(self.sink_keys))
        return CodedSegment(self.key_rows, self.value_rows, self.num_heads, self.quantiser.rotation, first)

    # -- the contract --------------------------------------------------------------------------------------------

    def outliers(self) -> int:
        """Entries of the exact context that would be kept beside the codes, of all sequences."""
        keys, values = self.exact_keys.view(), self.exact_values.view()
        self.shift = self._shift(keys)
        padded = self.cache is not None and self.cache.valid is not None
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
        padded = self.cache is not None and self.cache.valid is not None
        exact = 2 * batch * heads * sinks * head_dim * keys.element_size()
        rows = batch * (tokens if padded else tokens - sinks)
        grids = (self.quantiser.keys, self.quantiser.values)
        codes = sum(coded_nbytes(grid, bits, heads * head_dim, rows, 0) for grid in grids)
        return exact + codes + coded_nbytes(grids[0], bits, heads * head_dim, 0, outliers)

    def compressed_nbytes_by_part(self) -> dict[str, int]:
        keys, values = self.key_rows.nbytes_by_part(), self.value_rows.nbytes_by_part()
        sinks = self.sink_keys.nbytes() + self.sink_values.nbytes()
        parts = {part: size + values[part] for part, size in keys.items()} | {"sinks": sinks}
        return {part: size for part, size in parts.items() if size}

    def fixed_nbytes(self) -> int:
        rotation = self.quantiser.rotation
        shared = rotation.nbytes() if rotation is not None and self.index == 0 else 0
        return self.quantiser.nbytes() + shared

    def compressed_dense(self) -> tuple[Tensor, Tensor]:
        sinks = (self.sink_keys.view(), self.sink_values.view()) if len(self.sink_keys) else None
        if not len(self.key_rows):
            assert sinks is not None
            return sinks
        keys, values = (states.to(self.dtype) for states in self._coded().dense())
        if sinks is None:
            return keys, values
        if self.sink_columns is None:
            return torch.cat([sinks[0], keys], dim=2), torch.cat([sinks[1], values], dim=2)
        index = self._sink_index(keys)
        return keys.scatter(2, index, sinks[0]), values.scatter(2, index, sinks[1])

    def buffers(self) -> Sequence[GrowingBuffer]:
        return (self.sink_keys, self.sink_values)

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        super().map_batch(select)
        self.key_rows.map_batch(select)
        self.value_rows.map_batch(select)
        self.shift = None if self.shift is None else select(self.shift)
        self.sink_columns = None if self.sink_columns is None else select(self.sink_columns)

    def crop_compressed(self, tokens: int) -> None:
        if self.sink_columns is not None and tokens < self.context:
            raise UserError("cannot crop into the context of a padded batch with exact sinks: start a new cache")
        sinks = 0 if self.sink_columns is not None else min(tokens, len(self.sink_keys))
        if self.sink_columns is None:
            self.sink_keys.crop(sinks)
            self.sink_values.crop(sinks)
        self.key_rows.crop(tokens - sinks)
        self.value_rows.crop(tokens - sinks)

    def reset(self) -> None:
        super().reset()
        self.key_rows.clear()
        self.value_rows.clear()
        self.sink_columns = self.shift = None


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
            outliers = [layer.outliers() for layer in self.layers]
            tokens = self.get_seq_length() * self.layers[0].exact_keys.view().shape[0]

            def nbytes(bits: int) -> int:
                pairs = zip(self.layers, outliers, strict=True)
                return sum(layer.coded_nbytes(bits, count) for layer, count in pairs)

            bits = self.choose(nbytes, tokens)
            for layer in self.layers:
                layer.bits = bits
        super().compress_layers()
