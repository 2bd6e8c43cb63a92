"""What every cache of kvgauge is: a `transformers.Cache` that can compress itself and count its bytes.

A layer passes through two phases. In the first it keeps exact keys and values, so that the prefill is the model's own.
`KVCache.compress` then replaces them by what the method stores. Streaming methods compress inside their own `attend`
and have nothing left to do there.

Two lengths are kept apart. The logical length counts tokens (positions): `get_seq_length`, masks and `generate` see it.
The physical length counts stored entries: merged and evicted caches hold fewer.

A model may have layers that nothing is to be compressed in (`kvgauge.layers.others`). The cache holds them where
transformers looks for them, in `KVCache.layers`; all else speaks of the layers in `KVCache.own`, and counts those.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from typing_extensions import Self

from kvgauge.architecture.head_frame import HeadFrame
from kvgauge.attend.mask import Mask
from kvgauge.errors import UserError
from kvgauge.layers import others
from kvgauge.layers.adoption import Prefill, adopt
from kvgauge.layers.reading import Reading
from kvgauge.store.rows import RowBuffer
from kvgauge.store.steps import Steps

if TYPE_CHECKING:
    from kvgauge.layers.inputs import LayerInputs


class LayerCache(CacheLayerMixin):
    """The cache of one layer.

    `update` returns the layer itself in the place of the keys; the attention function then calls `attend`.
    """

    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.cache: KVCache | None = None  # set by the KVCache that holds the layer
        self.index = 0
        self.compressed = False
        self.logical_length = 0
        self.steps: Steps | None = None  # set while the shapes are fixed

    # -- what a subclass does ------------------------------------------------------------------------------------

    @abstractmethod
    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple:
        """Take in the keys and values of new tokens, (batch, num_key_value_heads, tokens, head_dim), post-RoPE."""

    @abstractmethod
    def attend(self, query: Tensor, *, mask: Mask, scaling: float, position_ids: Tensor | None) -> Tensor:
        """See `kvgauge.attend.attention.Attendable`."""

    def attend_again(self, query: Tensor, mask: Mask, scaling: float) -> Tensor:
        """The same for the queries of another layer of the model, which reads this one's cache; after `attend`.

        Raises:
            UserError: the layer cannot serve two.
        """
        raise UserError(
            f"{type(self).__name__} serves one attention layer, and several share a cache in this model: "
            f"use a method that compresses once, after the context"
        )

    @abstractmethod
    def compress(self) -> None:
        """Replace the exact keys and values by what the method stores; a second call does nothing."""

    @abstractmethod
    def attend_entries(self, query: Tensor, scaling: float) -> Tensor:
        """The attention output of one query per head to all that is stored, as a step computes it. For measuring only.

        Args:
            query: (batch, num_attention_heads, 1, head_dim), at the position that the stored keys are made for.
            scaling: factor on the scores.

        Returns:
            (batch, 1, num_attention_heads, head_dim).
        """

    @abstractmethod
    def nbytes_by_part(self) -> dict[str, int]:
        """Bytes of the live tensors of all sequences, by what they are for."""

    def read_nbytes(self) -> int:
        """Bytes that a decode step reads for this layer: what it holds, and all of what it shares with other layers."""
        return sum(self.nbytes_by_part().values())

    @abstractmethod
    def dense(self) -> tuple[Tensor, Tensor]:
        """(keys, values) as the model would have seen them, shapes as in `update`. For measuring only.

        Raises:
            UserError: entries no longer stand for single tokens.
        """

    @abstractmethod
    def buffers(self) -> Sequence[RowBuffer]:
        """Every buffer whose first dimension is the batch."""

    def share(self, keys: Tensor, values: Tensor) -> None:
        """Hold the exact keys and values of another cache in an empty layer; shapes as in `update`, nothing is copied.

        The layer must be compressed before anything is appended.
        """
        raise UserError(f"{type(self).__name__} cannot hold what another cache has read: let it read the context")

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Hold keys and values that stand in for those of a context, in an empty layer; shapes as in `update`."""
        self.update(keys, values)

    @property
    def valid(self) -> Tensor | None:
        """(batch, tokens), False on padding, at `home`; None where there is none, or nobody knows."""
        known = None if self.cache is None else self.cache.valid
        return None if known is None else known.to(self.home)

    @property
    def home(self) -> torch.device:
        """Where the compressed tokens live: with the layer, unless they are shared with layers on other devices."""
        device: torch.device = self.device
        return device

    @property
    def physical_length(self) -> int:
        """Stored entries."""
        return self.logical_length

    def fixed_nbytes(self) -> int:
        """Bytes of what serves every sequence alike, e.g. projections."""
        return 0

    def compress_again(self) -> None:
        """Compress what has grown behind the compressed context, and give back spare capacity."""
        raise NotImplementedError

    def check_every(self, every: int) -> None:
        """Refuse to be compressed again every so many tokens, before any work is done.

        Raises:
            UserError: it cannot be, or not after this number of tokens.
        """
        if type(self).compress_again is LayerCache.compress_again:
            raise UserError(f"{type(self).__name__} is compressed once, after the context: leave while_decoding out")
        for buffer in self.buffers():
            if every % buffer.together:
                raise UserError(
                    f"while_decoding every {every} is no multiple of the {buffer.together} tokens that are quantised "
                    f"together: take one, or a smaller group of the quantiser"
                )

    def reversible_tokens(self) -> int:
        """How many tokens can follow in one forward pass and be cropped again.

        The layer then answers, and is left, as if those that remain had come one by one and the others never. 0 where
        that is not sure.
        """
        return 0

    # -- steps of one shape --------------------------------------------------------------------------------------

    def growing(self) -> Sequence[RowBuffer] | None:
        """The buffers that a decode step appends a row to; None where it changes more than those."""
        return None

    def fix_shapes(self, steps: Steps) -> None:
        """See `KVCache.fix_shapes`; `logical_length` is then what it will be at most."""
        growing = self.growing()
        if growing is None or not self.compressed:
            raise UserError(f"decode steps of {type(self).__name__} change more than one row: they are no one graph")
        for buffer in growing:
            buffer.fix(steps)
        self.steps = steps
        self.logical_length += steps.room

    def release_shapes(self) -> None:
        """See `KVCache.release_shapes`."""
        assert self.steps is not None
        for buffer in self.growing() or ():
            buffer.release(self.steps)
        self.logical_length += self.steps.count() - self.steps.room
        self.steps = None

    def came(self, tokens: int) -> None:
        """So many more tokens were given to `update`."""
        if self.steps is None:
            self.logical_length += tokens

    # -- the contract with transformers --------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.logical_length if self.steps is not None else self.logical_length + query_length), 0

    def get_seq_length(self) -> int:
        return self.logical_length

    def get_max_length(self) -> int:
        return -1

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        """Apply a selection along the batch to every buffer."""
        for buffer in self.buffers():
            buffer.map_batch(select)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.map_batch(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map_batch(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map_batch(lambda rows: rows[indices])

    def reset(self) -> None:
        for buffer in self.buffers():
            buffer.clear()
        self.compressed, self.logical_length, self.is_initialized = False, 0, False


@dataclass(frozen=True)
class Recompression:
    """One compression while decoding.

    Attributes:
        tokens: of the whole sequence.
        before, after: bytes of all sequences.
        seconds: that it took.
    """

    tokens: int
    before: int
    after: int
    seconds: float


@dataclass(frozen=True)
class Placement:
    """Where a cache's layers stand in a model.

    Attributes:
        own: for each of them, the index of its layer in transformers' caches.
        frames: for each, the frame in which it takes keys and queries; None: as the model makes them.
        readers: for each, the attention layers that read its cache as well.
        others: makes the empty layers of all other places; at those of `own`, a state that the layer has beside its
            keys and values, or None.
    """

    own: tuple[int, ...]
    frames: tuple[HeadFrame | None, ...]
    readers: tuple[frozenset[int], ...]
    others: Callable[[], list[Any]]


class KVCache(Cache):
    """A compressible cache of a whole model.

    Args:
        layers: one `LayerCache` per layer of the model that may be compressed.
        context_length: compress by itself as soon as this many tokens are cached, at the end of the forward pass that
            reaches it: for ``generate`` and for other people's loops. None waits for `compress`.

    Attributes:
        own: the layers given; every index of a layer counts these, where transformers does not ask.
        layers: of the whole model, as transformers counts them; the same until `place`.
        prefill: what it needs of the prefill that fills it.
        moves: keys and queries of new tokens are turned to other positions than the model's.
    """

    prefill = Prefill.EXACT
    moves: ClassVar[bool] = False

    def __init__(self, layers: Sequence[LayerCache], *, context_length: int | None = None) -> None:
        super().__init__(layers=list(layers))
        self.own: list[Any] = list(layers)
        self.placement: Placement | None = None
        self.states: Cache | None = None  # every layer that is not ours, and states beside ours
        self._readers: set[int] = set()  # that have yet to attend in this pass
        self.context_length = context_length
        self.steps: Steps | None = None  # set while the shapes are fixed
        self.valid: Tensor | None = None  # (batch, tokens): False on padding; None while nothing is padded
        self.positions: Tensor | None = None  # (batch or 1, tokens): the positions that the model used
        self.inputs: LayerInputs | None = None  # for those who adopt this cache and look at more than keys and values
        self.compressed_tokens = 0
        self.compress_seconds = 0.0  # wall time of the compression: part of the time to first token
        self.every: int | None = None  # tokens between two compressions while decoding, see `compress_every`
        self.recompressions: list[Recompression] = []
        self._periods = 0  # of `every` tokens that have been compressed again
        for index, layer in enumerate(layers):
            layer.cache, layer.index = self, index

    def place(self, placement: Placement) -> None:
        """Stand among the layers that transformers itself keeps of a model."""
        self.placement = placement
        self._fill_places()

    def _fill_places(self) -> None:
        assert self.placement is not None
        self.states = Cache(layers=self.placement.others())
        self.layers = list(self.states.layers)
        for index, layer in zip(self.placement.own, self.own, strict=True):
            self.layers[index] = layer

    def take_others(self, source: KVCache) -> None:
        """Go on from the tokens that the layers left to transformers have read in another cache of the same model."""
        if self.placement is not None and source.states is not None:
            held = [None if layer is None else others.copied(layer) for layer in source.states.layers]
            self.states = Cache(layers=held)
            self.layers = [layer if isinstance(layer, LayerCache) else held[at] for at, layer in enumerate(self.layers)]

    def framed(self, index: int, keys: Tensor) -> Tensor:
        """Keys of the model as the layer `index` takes them."""
        frame = None if self.placement is None else self.placement.frames[index]
        return keys if frame is None else frame.keys(keys)

    def others(self) -> list[Any]:
        """The layers and states that are left to transformers."""
        return [] if self.states is None else [layer for layer in self.states.layers if layer is not None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Any, Any]:
        """See `transformers.Cache.update`; layers of ours hand back what attends, in the place of the keys."""
        layer, placement = self.layers[layer_idx], self.placement
        if placement is None or not isinstance(layer, LayerCache):
            keys, values = layer.update(key_states, value_states, *args, **kwargs)
            return keys, values
        frame, readers = placement.frames[layer.index], placement.readers[layer.index]
        layer.update(key_states if frame is None else frame.keys(key_states), value_states, *args, **kwargs)
        if frame is None and not readers:
            return layer, layer
        self._readers |= readers
        reading = Reading(layer, layer_idx, frame)
        return reading, reading

    # -- compression ---------------------------------------------------------------------------------------------

    @property
    def compressed(self) -> bool:
        return all(layer.compressed for layer in self.own) if self.own else self.compressed_tokens > 0

    @torch.no_grad()
    def compress(self) -> None:
        """Compress what is cached: the context. Further tokens are added as the method provides.

        A second call does nothing.
        """
        if self.compressed:
            return
        self.compressed_tokens = self.get_seq_length()
        start = time.perf_counter()
        for layer in self.others():
            others.trim(layer)
        self.compress_layers()
        self.compress_seconds = time.perf_counter() - start

    def compress_every(self, every: int | None) -> Self:
        """Compress again while decoding: at the end of the pass in which a multiple of `every` tokens is reached.

        Tokens are columns behind the context, those of the question included. None compresses the context alone.

        Raises:
            UserError: a layer cannot.
        """
        if every is not None:
            for layer in self.own:
                layer.check_every(every)
        self.every = every
        return self

    def uncompressed_room(self) -> int | None:
        """Tokens up to the next compression while decoding, 1 or more; None where there is none to come."""
        if self.every is None or not self.compressed:
            return None
        return self.every - (self.get_seq_length() - self.compressed_tokens) % self.every

    def compress_again(self) -> None:
        """Compress what has grown behind the context, in every layer."""
        for layer in self.own:
            layer.compress_again()

    def _compress_grown(self) -> None:
        """`compress_again`, where a multiple has been reached since the last time."""
        if self.every is None or not self.compressed:
            return
        periods = (self.get_seq_length() - self.compressed_tokens) // self.every
        if periods <= self._periods:
            return
        self._periods = periods
        before, start = self.nbytes(), time.perf_counter()
        with torch.no_grad():
            self.compress_again()
        seconds = time.perf_counter() - start
        self.recompressions.append(Recompression(self.get_seq_length(), before, self.nbytes(), seconds))

    def expect(self, tokens: int, padding: Sequence[int] | None = None) -> None:
        """How many context tokens will come, before the first of them: streaming caches size themselves by it.

        Args:
            tokens: of the whole context, padding included.
            padding: how many of them are padding in each sequence; None where nothing is padded.
        """

    def drive(self, model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """Prefill `ids` in a loop of its own, for caches that need more of the model than forward passes.

        Args:
            model: that the cache was made for.
            ids: (batch, tokens).
            mask: (batch, cached + tokens), False on padding; None where nothing is padded.

        Returns:
            The logits of the last token (batch, vocabulary), or None: the caller's loop will do.
        """
        return None

    def compress_layers(self) -> None:
        """Compress layer by layer; caches that join layers replace this."""
        for layer in self.own:
            layer.compress()

    def adopt(self, source: KVCache) -> None:
        """Take over the exact keys and values of another cache without a prefill of its own; shares, does not copy.

        Call `compress` right after: the shared storage must not be appended to.

        Raises:
            UserError: see `kvgauge.layers.adoption`.
        """
        adopt(self, source)

    @property
    def fillable(self) -> bool:
        """Keys and values can stand in for a prefill, where only time and bytes matter."""
        return self.prefill is Prefill.EXACT

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Fill every layer of an empty cache without a model.

        Args:
            keys, values: of a context, the same for all layers; shapes as in `LayerCache.update`.

        Raises:
            UserError: the cache is not `fillable`.
        """
        if not self.fillable:
            raise UserError(f"{type(self).__name__} needs more of a prefill than keys and values: run the model")
        for layer in self.own:
            layer.fill(keys, values)
        self.positions = torch.arange(keys.shape[2], device=keys.device)[None]

    def check_batch(self, batch: int) -> None:
        """Called when it is known what the sequences are.

        Raises:
            UserError: the cache cannot hold them, in this number or with this padding.
        """

    # -- what the layers report ----------------------------------------------------------------------------------

    def observe(self, query: Tensor, mask: Mask, position_ids: Tensor | None) -> None:
        """Remember which tokens are padding and which positions the model used; layer 0 reports every forward."""
        if self.steps is not None:
            return  # positions go on by one, and nothing is padding: see `release_shapes`
        batch, queries, total = query.shape[0], query.shape[2], self.get_seq_length()
        seen = mask.seen_by_last(total)  # every token that is not padding
        if seen is not None:
            self.valid = None if self.valid is None and bool(seen.all()) else seen.expand(batch, -1).clone()
        elif self.valid is not None:
            self.valid = torch.cat([self.valid, self.valid.new_ones(batch, total - self.valid.shape[1])], dim=1)
        if position_ids is None:
            position_ids = torch.arange(total - queries, total, device=query.device)[None]
        elif position_ids.shape[-1] != queries:
            position_ids = position_ids[..., -queries:]
        known = self.positions
        if known is None or known.shape[1] == 0:
            self.positions = position_ids
        else:
            rows = max(known.shape[0], position_ids.shape[0])
            self.positions = torch.cat([known.expand(rows, -1), position_ids.expand(rows, -1)], dim=1)
        self.check_batch(batch)

    def layer_done(self, index: int) -> None:
        """Called by a layer after it attended; the last layer ends a forward pass, or the last to read its cache."""
        if index == len(self.own) - 1 and not self._readers:
            self._pass_done()

    def reader_done(self, place: int) -> None:
        """Called after the attention layer at `place` of the model attended to the cache of another one."""
        self._readers.discard(place)
        if not self._readers:
            self._pass_done()

    def _pass_done(self) -> None:
        if self.steps is not None:
            self.steps.advance()
        if self.context_length is not None and not self.compressed and self.get_seq_length() >= self.context_length:
            self.compress()
        self._compress_grown()

    # -- steps of one shape --------------------------------------------------------------------------------------

    def fix_shapes(self, tokens: int) -> None:
        """Take the room of `tokens` more tokens at once: decode steps then have one shape, and can be one CUDA graph.

        Each of the steps that follow takes a single token, at the position behind the one before it; an attention mask,
        where rows are padded, is as long as the cache will be, with True for what is to come. How many have come is a
        number on the device; `get_seq_length` gives it as transformers' static caches do. Bytes count the whole room.

        Args:
            tokens: the most that may come before `release_shapes`.

        Raises:
            UserError: the cache is not compressed, or its steps change more than one row of each buffer.
        """
        if not self.compressed or self.steps is not None:
            raise UserError("shapes are fixed once, and of a compressed cache: call cache.compress() first")
        if self.every is not None:
            raise UserError("steps that compress what has grown are of several shapes: leave while_decoding out")
        if self.others() or any(self.placement.readers if self.placement is not None else ()):
            raise UserError(
                "this model has layers of other kinds beside the cache's: its decode steps are no one graph"
            )
        self.steps = Steps(tokens)
        try:
            for layer in self.own:
                layer.fix_shapes(self.steps)
        except UserError:
            for layer in self.own:
                if layer.steps is not None:
                    layer.release_shapes()
            self.steps = None
            raise

    def release_shapes(self) -> int:
        """Grow as tokens come again; how many have come since `fix_shapes`, which waits for the device."""
        assert self.steps is not None
        came = self.steps.count()
        for layer in self.own:
            layer.release_shapes()
        self.steps = None
        if self.valid is not None:
            self.valid = torch.cat([self.valid, self.valid.new_ones(self.valid.shape[0], came)], dim=1)
        if self.positions is not None and self.positions.shape[1]:
            later = torch.arange(1, came + 1, device=self.positions.device)
            self.positions = torch.cat([self.positions, self.positions[:, -1:] + later], dim=1)
        return came

    def reversible_tokens(self) -> int:
        """See `LayerCache.reversible_tokens`; what every layer of the compressed cache can."""
        limits = [others.reversible_tokens(layer) for layer in self.others()]
        limits += [layer.reversible_tokens() for layer in self.own]
        room = self.uncompressed_room()
        limits.append(None if room is None else room - 1)
        return min(limit for limit in limits if limit is not None) if self.compressed else 0

    # -- measures ------------------------------------------------------------------------------------------------

    def nbytes_by_part(self) -> dict[str, int]:
        """Live bytes of all sequences and layers, by what they are for; projections are `fixed_nbytes`."""
        total: Counter[str] = Counter()
        for layer in self.own:
            total.update(layer.nbytes_by_part())
        left = sum(map(others.nbytes, self.others()))
        return dict(total) | ({"others": left} if left else {})

    def nbytes(self) -> int:
        """Live bytes of all sequences and layers."""
        return sum(self.nbytes_by_part().values())

    def read_nbytes(self) -> int:
        """Bytes that a decode step reads: a basis that G layers share is held once and read G times."""
        return sum(layer.read_nbytes() for layer in self.own) + sum(map(others.nbytes, self.others()))

    def fixed_nbytes(self) -> int:
        """Bytes that serve every sequence alike, such as projections."""
        return sum(layer.fixed_nbytes() for layer in self.own)

    def remarks(self) -> dict[str, list[int]]:
        """What a method counted while it compressed, one number per layer, by name."""
        return {}

    def physical_length(self, layer_idx: int = 0) -> int:
        """Stored entries of a layer."""
        return int(self.own[layer_idx].physical_length)

    def dense(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """(keys, values) of a layer as the model would have seen them; for measuring only.

        Raises:
            UserError: entries no longer stand for single tokens (merged and evicted caches).
        """
        keys, values = self.own[layer_idx].dense()
        frame = None if self.placement is None else self.placement.frames[layer_idx]
        return keys if frame is None else frame.model_keys(keys), values

    # -- batches -------------------------------------------------------------------------------------------------

    def _map_records(self, select: Callable[[Tensor], Tensor]) -> None:
        if self.valid is not None:
            self.valid = select(self.valid)
        if self.positions is not None and self.positions.shape[0] > 1:
            self.positions = select(self.positions)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for layer in self.own:
            layer.reorder_cache(beam_idx)
        self._select_others(beam_idx)
        self._map_records(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        for layer in self.own:
            layer.batch_repeat_interleave(repeats)
        for layer in self.others():
            batch = next((tensor.shape[0] for tensor in others.tensors(layer)), 0)
            others.select(layer, torch.arange(batch).repeat_interleave(repeats))
        self._map_records(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        for layer in self.own:
            layer.batch_select_indices(indices)
        self._select_others(indices)
        self._map_records(lambda rows: rows[indices])

    def _select_others(self, rows: Tensor) -> None:
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        for layer in self.others():
            others.select(layer, rows)

    def crop(self, tokens_to_remove: int) -> None:
        if self.steps is not None:
            self.release_shapes()
        left = self.others() if tokens_to_remove else []
        for layer in left:
            others.check_crop(layer)
        for layer in (*self.own, *left):
            layer.crop(tokens_to_remove)
        total = self.get_seq_length()
        if self.every is not None:
            self._periods = min(self._periods, max(0, total - self.compressed_tokens) // self.every)
        self.valid = None if self.valid is None else self.valid[:, :total]
        self.positions = None if self.positions is None else self.positions[:, :total]

    def reset(self) -> None:
        if self.steps is not None:
            self.release_shapes()
        for layer in self.own:
            layer.reset()
        if self.placement is not None:
            self._fill_places()
        self.valid = self.positions = None
        self._readers.clear()
        self.compressed_tokens, self._periods = 0, 0
        self.recompressions.clear()

    # -- states of linear attention, beside layers of ours or in transformers' own -------------------------------

    def _stateful(self) -> Cache:
        return Cache(layers=self.own) if self.states is None else self.states

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        state: Tensor | None = self._stateful().get_conv_state(layer_idx, state_idx)
        return state

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: object) -> Tensor:
        updated: Tensor = self._stateful().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)
        return updated

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        state: Tensor | None = self._stateful().get_recurrent_state(layer_idx, state_idx)
        return state

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: object
    ) -> Tensor:
        updated: Tensor = self._stateful().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)
        return updated

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return bool(self._stateful().has_previous_state(layer_idx, state_idx))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that were read; of every layer, whatever it holds of them."""
        if self.steps is not None:
            first = self.own[0]
            taken = self.steps.on(first.home)[0] + (first.logical_length - self.steps.room)
            return taken  # a tensor, as of transformers' static caches
        if layer_idx == 0 and self.own:
            return int(self.own[0].get_seq_length())
        return int(super().get_seq_length(layer_idx))
