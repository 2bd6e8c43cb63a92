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

from kvgauge.caches.attention import segmented_attention
from kvgauge.caches.buffers import GrowingBuffer
from kvgauge.caches.rotation import PlaneRotation, interleaved, to_planes
from kvgauge.caches.selection import ChunkSelection, SelectedSegment, mask_behind
from kvgauge.caches.subspace import SharedSubspace, TruncatedSVD
from kvgauge.caches.subspace_segment import SubspaceSegment
from kvgauge.caches.tail import TailedLayer
from kvgauge.errors import UserError

GroupRanks = Callable[[int], tuple[int, int]]  # tokens of a sequence → (rank_k, rank_v) of the group


@dataclass(frozen=True)
class CrossLayerSettings:
    """What all groups of a cache have in common.

    Attributes:
        rotation: keys are stored before this rotation; None stores them as the model caches them.
        fold_every: tokens of the tail that are projected on the basis at a time; None keeps the tail exact.
        selection: attend to the best chunks of the context only; None attends to all.
        svd: how the subspaces are found.
    """

    rotation: PlaneRotation | None = None
    fold_every: int | None = None
    selection: ChunkSelection | None = None
    svd: TruncatedSVD = field(default_factory=TruncatedSVD)


class CrossLayerGroup:
    """The subspaces of consecutive layers.

    Args:
        size: layers of the group.
        ranks: (rank_k, rank_v) for a sequence of a number of tokens; asked once per sequence, clipped to what its
            tokens and features allow.
        settings: of the cache.
    """

    def __init__(self, size: int, ranks: GroupRanks, settings: CrossLayerSettings) -> None:
        self.ranks, self.settings = ranks, settings
        self.keys, self.values = SharedSubspace(size), SharedSubspace(size)
        self.members = [CrossLayerLayer(self, member) for member in range(size)]
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def collect(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        """Take the exact keys and values of the next layer; the last one starts the factorisation."""
        self._waiting.append((keys, values))
        if len(self._waiting) < len(self.members):
            return
        waiting, self._waiting = self._waiting, []
        key_rows = [self.key_rows(layer_keys) for layer_keys, _ in waiting]
        value_rows = [self.value_rows(layer_values) for _, layer_values in waiting]
        self.keys.fit(key_rows, valid, lambda length: self.ranks(length)[0], self.settings.svd)
        self.values.fit(value_rows, valid, lambda length: self.ranks(length)[1], self.settings.svd)

    def key_rows(self, keys: Tensor, start: int = 0) -> Tensor:
        """Keys (batch, heads, tokens, head_dim), the first at column `start`, as stored features (batch, tokens, F)."""
        rotation = self.settings.rotation
        if rotation is None:
            return self.value_rows(keys)
        columns = torch.arange(start, start + keys.shape[2], device=keys.device)
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
        self.keys.extend([self.key_rows(rows, start) for rows in keys])
        self.values.extend([self.value_rows(rows) for rows in values])

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
        super().__init__()
        self.group, self.member = group, member
        self.num_heads = 0  # kv-heads, known with the first tokens
        self.landmarks = GrowingBuffer()
        self.first_columns: Tensor | None = None  # (batch,): where each row begins behind its padding

    def store(self, keys: Tensor, values: Tensor) -> None:
        self.num_heads = keys.shape[1]
        valid = self.cache.valid if self.cache is not None else None
        selection = self.group.settings.selection
        if selection is not None:
            self.landmarks.set(selection.landmarks(keys, valid))
            self.first_columns = None if valid is None else valid.int().argmax(dim=1, keepdim=True)
        self.group.collect(keys, values, valid)

    def add_landmarks(self, keys: Tensor) -> None:
        selection = self.group.settings.selection
        if selection is not None:
            self.landmarks.append(selection.landmarks(keys, None))

    def context_segment(self) -> SubspaceSegment:
        group = self.group
        return SubspaceSegment(group.keys, group.values, self.member, self.num_heads, group.settings.rotation)

    def context_dense(self) -> tuple[Tensor, Tensor]:
        return self.context_segment().dense()

    def attend_compressed(self, query: Tensor, attention_mask: Tensor | None, scaling: float) -> Tensor:
        selection = self.group.settings.selection
        if selection is None or query.shape[2] > 1 or selection.chosen >= len(self.landmarks):
            output = super().attend_compressed(query, attention_mask, scaling)
        else:
            context = self.context_segment()
            starts = selection.choose(query, self.landmarks.view(), self.first_columns, len(context), scaling)
            chosen = SelectedSegment(context, starts, selection.chunk, attention_mask)
            mask = mask_behind(attention_mask, len(context), len(chosen))
            output = segmented_attention(query, [chosen, *self.tail_segments()], mask, scaling)
        if self.member == len(self.group.members) - 1:
            self.group.fold()
        return output

    def compressed_nbytes_by_part(self) -> dict[str, int]:
        spaces = (self.group.keys, self.group.values)
        parts = {
            "basis": sum(space.basis.nbytes() for space in spaces) if self.member == 0 else 0,
            "factors": sum(space.factors[self.member].nbytes() for space in spaces),
            "landmarks": self.landmarks.nbytes(),
            "tail": self.tail_nbytes(),
        }
        return {part: size for part, size in parts.items() if size}

    def fixed_nbytes(self) -> int:
        rotation = self.group.settings.rotation
        first = self.cache is not None and self is next(
            layer for layer in self.cache.layers if isinstance(layer, CrossLayerLayer)
        )
        return rotation.nbytes() if rotation is not None and first else 0

    def buffers(self) -> Sequence[GrowingBuffer]:
        own = [*super().buffers(), self.landmarks]
        for space in (self.group.keys, self.group.values):
            own.append(space.factors[self.member])
            if self.member == 0:
                own.append(space.basis)
        return own

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        super().map_batch(select)
        if self.first_columns is not None:
            self.first_columns = select(self.first_columns)

    def crop_compressed(self, tokens: int) -> None:
        stored = len(self.group.keys)
        if tokens < stored:
            if self.group.settings.selection is not None:
                raise UserError("cannot crop into the compressed context with sr: start a new cache")
            self.group.crop(tokens)
        self.tail_keys.crop(max(0, tokens - stored))
        self.tail_values.crop(max(0, tokens - stored))
