"""xKV on multi-head latent attention: one token basis for the latents of a group of layers.

The latents carry no rotation and serve as keys and as values: one basis is enough for both, and nothing is ever
rebuilt. The rotary keys stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvgauge.attend.attention import Segment
from kvgauge.attend.mask import Mask
from kvgauge.layers.home import shared_home
from kvgauge.layers.mla import LatentAttentionLayer, LatentTokens
from kvgauge.methods.across_layers.subspace import SharedSubspace, TruncatedSVD
from kvgauge.store.buffers import GrowingBuffer
from kvgauge.store.rows import RowBuffer


class LatentSubspaceSegment:
    """The tokens of the basis, seen by one layer, with their rotary keys (batch, 1, tokens, dimension)."""

    num_key_value_heads = 1

    def __init__(self, space: SharedSubspace, member: int, rotary: Tensor) -> None:
        self.basis = space.basis.dense().unsqueeze(1)
        self.factor = space.factors[member].dense().unsqueeze(1)
        self.rotary = rotary

    def __len__(self) -> int:
        return self.rotary.shape[2]

    def scores(self, query: Tensor) -> Tensor:
        """See `kvgauge.attend.attention.Segment`; queries are absorbed."""
        latent, rotary = query.split([self.factor.shape[2], self.rotary.shape[3]], dim=-1)
        return (latent @ self.factor) @ self.basis.transpose(-1, -2) + rotary @ self.rotary.transpose(-1, -2)

    def mix(self, weights: Tensor) -> Tensor:
        """Weighted sums of the approximated latents."""
        return (weights @ self.basis) @ self.factor.transpose(-1, -2)


class CrossLayerLatentGroup:
    """The subspace of the latents of consecutive layers.

    Args:
        size: layers of the group.
        rank: for a sequence of a number of tokens.
        svd: how the subspace is found.
        fold_every: tokens of the tail that are projected on the basis at a time; None keeps the tail exact.
    """

    def __init__(self, size: int, rank: Callable[[int], int], svd: TruncatedSVD, fold_every: int | None) -> None:
        self.rank, self.svd, self.fold_every = rank, svd, fold_every
        self.latents = SharedSubspace(size)
        self.members = [CrossLayerLatentLayer(self, member) for member in range(size)]
        self._waiting: list[Tensor] = []

    @property
    def home(self) -> torch.device:
        """See `shared_home`."""
        return shared_home(self.members)

    def collect(self, latents: Tensor, valid: Tensor | None) -> None:
        """Take the exact latents (batch, tokens, kv_lora_rank) of the next layer; the last one starts the SVD."""
        self._waiting.append(latents)
        if len(self._waiting) == len(self.members):
            waiting, self._waiting = self._waiting, []
            self.latents.fit(waiting, valid, self.rank, self.svd)

    def fold(self) -> None:
        """Project the oldest tokens of the tail, `fold_every` at a time, once all layers of the pass have attended."""
        every = self.fold_every
        surplus = 0 if every is None else len(self.members[0].tail) // every * every
        if surplus:
            self.latents.extend([member.tail.drop_front(surplus)[:, 0] for member in self.members])

    def absorb(self) -> None:
        """Take the whole tail into the subspace, at the rank of the longer sequence."""
        first, waiting = self.members[0], len(self.members[0].tail)
        if not waiting:
            return
        total, valid = len(self.latents) + waiting, first.valid
        lengths, new = [total] * first.tail.view().shape[0], None
        if valid is not None:
            lengths, new = valid[:, :total].sum(dim=1).tolist(), valid[:, total - waiting : total]
        rows = [member.tail.drop_front(waiting)[:, 0] for member in self.members]
        self.latents.absorb(rows, new, lengths, self.rank, self.svd)


class CrossLayerLatentLayer(LatentAttentionLayer):
    """One layer of a group; the first one counts the shared basis as its own."""

    def __init__(self, group: CrossLayerLatentGroup, member: int) -> None:
        super().__init__()
        self.group, self.member = group, member
        self.tail = GrowingBuffer()
        self.rotary_keys = GrowingBuffer()

    @property
    def home(self) -> torch.device:
        return self.group.home

    def store(self, keys: Tensor, values: Tensor) -> None:
        self.rotary_keys.set(values)
        self.group.collect(keys[:, 0], self.valid)

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.tail.append(keys)
        self.rotary_keys.append(values)

    def segments(self) -> list[Segment]:
        stored, rotary = len(self.group.latents), self.rotary_keys.view()
        segments: list[Segment] = [LatentSubspaceSegment(self.group.latents, self.member, rotary[:, :, :stored])]
        if len(self.tail):
            segments.append(LatentTokens(self.tail.view(), rotary[:, :, stored:]))
        return segments

    def attend_compressed(self, query: Tensor, mask: Mask, scaling: float) -> Tensor:
        output = super().attend_compressed(query, mask, scaling)
        if self.member == len(self.group.members) - 1:
            self.group.fold()
        return output

    def compress_again(self) -> None:
        if self.member == 0:
            self.group.absorb()
            self.group.latents.trim()
        for buffer in (self.tail, self.rotary_keys):
            buffer.trim()

    def compressed_nbytes_by_part(self) -> dict[str, int]:
        space = self.group.latents
        parts = {
            "basis": space.basis.nbytes() if self.member == 0 else 0,
            "factors": space.factors[self.member].nbytes(),
            "rotary_keys": self.rotary_keys.nbytes(),
            "tail": self.tail.nbytes(),
        }
        return {part: size for part, size in parts.items() if size}

    def read_nbytes(self) -> int:
        return super().read_nbytes() + (self.group.latents.basis.nbytes() if self.member else 0)

    def compressed_dense(self) -> tuple[Tensor, Tensor]:
        latents = self.group.latents.rebuild(self.member).unsqueeze(1)
        if len(self.tail):
            latents = torch.cat([latents, self.tail.view()], dim=2)
        return latents, self.rotary_keys.view()

    def buffers(self) -> Sequence[RowBuffer]:
        space = self.group.latents
        own: list[RowBuffer] = [self.tail, self.rotary_keys, space.factors[self.member]]
        return [*own, space.basis] if self.member == 0 else own

    def crop_compressed(self, tokens: int) -> None:
        self.group.latents.basis.crop(tokens)
        self.tail.crop(max(0, tokens - len(self.group.latents)))
        self.rotary_keys.crop(tokens)
