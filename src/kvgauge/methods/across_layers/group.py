"""xKV's storage: one token basis for the keys of a group of layers, one for their values, and a factor per layer.

With ``X = [X_1 … X_G] ≈ Z Wᵀ`` a layer's values are ``Z W_lᵀ`` and are never rebuilt: ``p V ≈ (p Z) W_lᵀ``. Post-RoPE
keys are not either: ``q Kᵀ ≈ (q W_l) Zᵀ``. Pre-RoPE keys are, block by block, because the rotation stands between
the two factors; a block is scored and forgotten before the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvgauge.architecture.planes import PlaneRotation, interleaved, to_planes
from kvgauge.attend.attention import Segment, segmented_attention
from kvgauge.attend.mask import Mask
from kvgauge.calibration.weighting import Weighting
from kvgauge.errors import UserError
from kvgauge.layers.home import shared_home
from kvgauge.layers.sinks import ExactSinks
from kvgauge.layers.tail import TailedLayer
from kvgauge.methods.across_layers.selection import ChunkSelection, SelectedSegment
from kvgauge.methods.across_layers.subspace import SharedSubspace, TruncatedSVD
from kvgauge.methods.across_layers.subspace_segment import SubspaceSegment
from kvgauge.store.rows import RowBuffer
from kvgauge.store.storage import EXACT, PARTS, Storage

GroupRanks = Callable[[int], tuple[int, int]]  # tokens of a sequence → (rank_k, rank_v) of the group


@dataclass(frozen=True)
class CrossLayerSettings:
    """What all groups of a cache have in common.

    Attributes:
        fold_every: tokens of the tail that are projected on the basis at a time; None keeps the tail exact.
        selection: attend to the best chunks of the context only; None attends to all.
        svd: how the subspaces are found.
        sinks: first tokens that stay exact and have no part in the subspaces.
        normalize: join layers at the same mean square, see `SharedSubspace`.
        storage: of bases, factors and tails.
    """

    fold_every: int | None = None
    selection: ChunkSelection | None = None
    svd: TruncatedSVD = field(default_factory=TruncatedSVD)
    sinks: int = 0
    normalize: bool = False
    storage: Storage = EXACT


class CrossLayerGroup:
    """The subspaces of consecutive layers.

    Args:
        size: layers of the group.
        ranks: (rank_k, rank_v) for a sequence of a number of tokens; asked once per sequence, clipped to what its
            tokens and features allow.
        settings: of the cache.
        weights: metrics of keys and of values, in the order of their stored features.
        rotations: of each layer; keys are stored before it. None stores them as the model caches them.
    """

    def __init__(
        self,
        size: int,
        ranks: GroupRanks,
        settings: CrossLayerSettings,
        weights: tuple[Weighting | None, Weighting | None] = (None, None),
        rotations: Sequence[PlaneRotation | None] | None = None,
    ) -> None:
        self.ranks, self.settings = ranks, settings
        self.rotations = [None] * size if rotations is None else list(rotations)
        self.keys, self.values = (
            SharedSubspace(size, weighting, normalize=settings.normalize, storage=settings.storage, part=part)
            for part, weighting in zip(PARTS, weights, strict=True)
        )
        self.members = [CrossLayerLayer(self, member) for member in range(size)]
        self._waiting: list[tuple[Tensor, Tensor]] = []

    @property
    def home(self) -> torch.device:
        """See `shared_home`."""
        return shared_home(self.members)

    def collect(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        """Take the exact keys and values of the next layer; the last one starts the factorisation.

        Args:
            keys, values: (batch, num_key_value_heads, tokens, head_dim), without sinks that are cut off.
            valid: (batch, tokens), False on padding and on sinks that are not; None where there is neither.
        """
        self._waiting.append((keys, values))
        if len(self._waiting) < len(self.members):
            return
        exact_keys, exact_values = map(list, zip(*self._waiting, strict=True))
        self._waiting = []
        # what is no longer needed goes before the next copy is made
        rows = [self.key_rows(member, layer_keys) for member, layer_keys in enumerate(exact_keys)]
        exact_keys.clear()
        self.keys.fit(rows, valid, lambda length: self.ranks(length)[0], self.settings.svd)
        rows.clear()
        rows = [self.value_rows(layer_values) for layer_values in exact_values]
        exact_values.clear()
        self.values.fit(rows, valid, lambda length: self.ranks(length)[1], self.settings.svd)

    def key_rows(self, member: int, keys: Tensor, start: int = 0) -> Tensor:
        """Keys (batch, heads, tokens, head_dim) of a layer, from column `start` on, as features (batch, tokens, F).

        Columns count from each row's first token in the subspace: a metric of the keys is one of that frame.
        """
        rotation = self.rotations[member]
        if rotation is None:
            return self.value_rows(keys)
        columns = torch.arange(start, start + keys.shape[2], device=keys.device)
        first = self.members[0].first_columns
        if first is not None:
            columns = (columns - first)[:, None]
        turned = to_planes(keys) * rotation.phases(columns).conj()
        return self.value_rows(interleaved(turned).to(keys.dtype))

    @staticmethod
    def value_rows(values: Tensor) -> Tensor:
        """Values (batch, heads, tokens, head_dim) as features (batch, tokens, heads · head_dim)."""
        return values.transpose(1, 2).flatten(2)

    def fold(self) -> None:
        """Project the oldest tokens of the tail, `fold_every` at a time, once all layers of the pass have attended."""
        every = self.settings.fold_every
        surplus = 0 if every is None else len(self.members[0].tail_keys) // every * every
        if not surplus:
            return
        start = len(self.keys)
        keys = [member.tail_keys.drop_front(surplus) for member in self.members]
        values = [member.tail_values.drop_front(surplus) for member in self.members]
        for member, rows in zip(self.members, keys, strict=True):
            member.add_landmarks(rows)
        self.keys.extend([self.key_rows(member, rows, start) for member, rows in enumerate(keys)])
        self.values.extend([self.value_rows(rows) for rows in values])

    def absorb(self) -> None:
        """Take the whole tail into the subspaces, at the ranks of the longer sequence.

        Of chunks that share a landmark only whole ones: the others wait.
        """
        settings, first = self.settings, self.members[0]
        waiting = len(first.tail_keys)
        if settings.selection is not None:
            waiting -= waiting % settings.selection.chunk
        if not waiting:
            return
        start, valid = len(self.keys), first.valid
        total = first.sinks.cut + start + waiting
        lengths = [total - len(first.sinks)] * first.tail_keys.dense().shape[0]
        new = None
        if valid is not None:
            lengths = [max(1, seen - len(first.sinks)) for seen in valid[:, :total].sum(dim=1).tolist()]
            new = valid[:, total - waiting : total]
            new = None if bool(new.all()) else new
        keys = [member.tail_keys.drop_front(waiting) for member in self.members]
        values = [member.tail_values.drop_front(waiting) for member in self.members]
        for member, rows in zip(self.members, keys, strict=True):
            member.add_landmarks(rows, new)
        key_rows = [self.key_rows(member, rows, start) for member, rows in enumerate(keys)]
        value_rows = [self.value_rows(rows) for rows in values]
        self.keys.absorb(key_rows, new, lengths, lambda length: self.ranks(length)[0], settings.svd)
        self.values.absorb(value_rows, new, lengths, lambda length: self.ranks(length)[1], settings.svd)

    def crop(self, tokens: int) -> None:
        self.keys.basis.crop(tokens)
        self.values.basis.crop(tokens)


class CrossLayerLayer(TailedLayer):
    """One layer of a group; the first one counts the shared bases as its own.

    Args:
        group: what it shares.
        member: its index in the group.
    """

    def __init__(self, group: CrossLayerGroup, member: int) -> None:
        super().__init__(group.settings.storage)
        self.group, self.member = group, member
        self.num_heads = 0  # kv-heads, known with the first tokens
        self.sinks = ExactSinks(group.settings.sinks, group.settings.storage, spare=1)
        self.landmarks = group.settings.storage.kept()
        self.first_columns: Tensor | None = None  # (batch, 1): where each row begins behind its padding and its sinks

    @property
    def home(self) -> torch.device:
        return self.group.home

    @property
    def rotation(self) -> PlaneRotation | None:
        """What stands between its keys and what is stored; layers that rotate alike share one."""
        return self.group.rotations[self.member]

    def store(self, keys: Tensor, values: Tensor) -> None:
        self.num_heads = keys.shape[1]
        keys, values, valid = self.sinks.take(keys, values, self.valid)
        self.first_columns = None if valid is None else valid.int().argmax(dim=1, keepdim=True)
        selection = self.group.settings.selection
        if selection is not None:
            self.landmarks.set(selection.landmarks(keys, valid))
        self.group.collect(keys, values, valid)

    def add_landmarks(self, keys: Tensor, valid: Tensor | None = None) -> None:
        selection = self.group.settings.selection
        if selection is not None:
            self.landmarks.append(selection.landmarks(keys, valid))

    def compress_again(self) -> None:
        if self.member == 0:
            self.group.absorb()
            self.group.keys.trim()
            self.group.values.trim()
        for buffer in (self.tail_keys, self.tail_values, self.landmarks):
            buffer.trim()

    def check_every(self, every: int) -> None:
        super().check_every(every)
        selection = self.group.settings.selection
        if selection is not None and every % selection.chunk:
            raise UserError(f"while_decoding every {every} is not a multiple of sr's chunk {selection.chunk}")

    def context_segment(self) -> SubspaceSegment:
        group, rotation = self.group, self.rotation
        first = None if rotation is None else self.first_columns
        return SubspaceSegment(group.keys, group.values, self.member, self.num_heads, rotation, first)

    def context_dense(self) -> tuple[Tensor, Tensor]:
        return self.sinks.restored(*self.context_segment().dense())

    def attend_compressed(self, query: Tensor, mask: Mask, scaling: float) -> Tensor:
        selection = self.group.settings.selection
        mask = self.sinks.mask(mask, query.shape[2], self.logical_length)
        context: Segment = self.context_segment()
        if selection is not None and query.shape[2] == 1 and selection.chosen < len(self.landmarks):
            context, mask = self._selected(selection, query, mask, scaling)
        segments = [*self.sinks.segments(), context, *self.tail_segments()]
        output = segmented_attention(query, segments, mask, scaling)
        if self.member == len(self.group.members) - 1:
            self.group.fold()
        return output

    def _selected(self, selection: ChunkSelection, query: Tensor, mask: Mask, scaling: float) -> tuple[Segment, Mask]:
        """The best chunks of the context, and the mask of everything with theirs in the place of the context's."""
        context, sinks = self.context_segment(), len(self.sinks)
        starts = selection.choose(query, self.landmarks.dense(), self.first_columns, len(context), scaling)
        chosen = SelectedSegment(context, starts, selection.chunk, mask.behind(sinks))
        return chosen, mask.replaced(sinks, sinks + len(context), len(chosen))

    def compressed_nbytes_by_part(self) -> dict[str, int]:
        spaces = (self.group.keys, self.group.values)
        parts = {
            "basis": sum(space.basis.nbytes() for space in spaces) if self.member == 0 else 0,
            "factors": sum(space.factors[self.member].nbytes() for space in spaces),
            "landmarks": self.landmarks.nbytes(),
            "scales": sum(space.scales.nbytes() for space in spaces) if self.member == 0 else 0,
            "sinks": self.sinks.nbytes(),
            "tail": self.tail_nbytes(),
        }
        return {part: size for part, size in parts.items() if size}

    def read_nbytes(self) -> int:
        held, context = super().read_nbytes(), len(self.context_segment()) if self.compressed else 0
        basis = sum(space.basis.nbytes() for space in (self.group.keys, self.group.values))
        selection, share = self.group.settings.selection, 1.0
        if selection is not None and context:
            rows = (
                selection.chosen * selection.chunk * self.landmarks.dense().shape[1]
            )  # heads choose rows of their own
            share = min(1.0, rows / context)
        return held - (basis if self.member == 0 else 0) + round(share * basis)

    def fixed_nbytes(self) -> int:
        rotation = self.rotation
        others = () if self.cache is None else (one for one in self.cache.own if isinstance(one, CrossLayerLayer))
        first = self is next((one for one in others if one.rotation is rotation), None)
        weights = self.group.keys.fixed_nbytes() + self.group.values.fixed_nbytes() if self.member == 0 else 0
        return weights + (rotation.nbytes() if rotation is not None and first else 0)

    def buffers(self) -> Sequence[RowBuffer]:
        own: list[RowBuffer] = [*super().buffers(), self.landmarks, *self.sinks.buffers]
        for space in (self.group.keys, self.group.values):
            own.append(space.factors[self.member])
            if self.member == 0:
                own += [space.basis, space.scales]
        return own

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        super().map_batch(select)
        self.sinks.map_columns(select)
        if self.first_columns is not None:
            self.first_columns = select(self.first_columns)

    def growing(self) -> Sequence[RowBuffer] | None:
        return None if self.group.settings.fold_every is not None else super().growing()

    def reversible_tokens(self) -> int:
        settings = self.group.settings
        if settings.selection is not None:
            return 0  # one query chooses its chunks, several see the whole context
        room = super().reversible_tokens()
        return room if settings.fold_every is None else min(room, settings.fold_every - 1 - len(self.tail_keys))

    def crop_compressed(self, tokens: int) -> None:
        sinks, stored = self.sinks.cut, len(self.group.keys)
        if tokens < sinks + stored:
            if self.group.settings.selection is not None:
                raise UserError("cannot crop into the compressed context with sr: start a new cache")
            self.sinks.crop(tokens)
            self.group.crop(tokens - sinks)
        self.tail_keys.crop(max(0, tokens - sinks - stored))
        self.tail_values.crop(max(0, tokens - sinks - stored))
