"""Attention to one layer of a group that shares its token basis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvgauge.architecture.planes import BLOCK, PlaneRotation, from_planes, interleaved, planes_of, to_planes
from kvgauge.attend.attention import StoredTokens
from kvgauge.kernels.cpu.stored_attention import StoredRun
from kvgauge.methods.across_layers.subspace import SharedSubspace


@dataclass
class SubspaceSegment(StoredTokens):
    """All tokens of the basis, seen by one layer, as a segment of attention.

    Attributes:
        keys, values: the group's subspaces.
        member: which of their layers.
        num_key_value_heads: N.
        rotation: what stands between the keys' two factors; None where nothing does.
        first_columns: (batch, 1), the column that each row's rotations count from; None: all from 0.
    """

    keys: SharedSubspace
    values: SharedSubspace
    member: int
    num_key_value_heads: int
    rotation: PlaneRotation | None
    first_columns: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def scores(self, query: Tensor) -> Tensor:
        """See `kvgauge.attend.attention.Segment`."""
        factor = self.keys.factors[self.member].dense()
        batch, heads, rows, _ = query.shape
        if self.rotation is not None:
            return self._rebuilt_scores(query, factor, self.rotation)
        asked = query @ factor.unflatten(1, (heads, -1))
        return self.keys.basis.dot(asked.flatten(1, 2)).view(batch, heads, rows, -1)

    def _rebuilt_scores(self, query: Tensor, factor: Tensor, rotation: PlaneRotation) -> Tensor:
        batch, heads, rows, _ = query.shape
        tokens = len(self)
        starts = range(0, tokens, BLOCK)
        # Turning the query back to the start of each block leaves the keys with the offsets within it.
        turned = self.asked(query, rotation).unsqueeze(-3) * rotation.blocks(len(starts), query.device).conj()[:, None]
        queries = interleaved(turned).unbind(-3)
        scores = query.new_empty(batch, heads, rows, tokens)
        workspace = factor.new_empty(min(BLOCK, tokens), factor.shape[1])
        for block, start in enumerate(starts):
            stop = min(start + BLOCK, tokens)
            basis = self.keys.basis.block(start, stop)
            for sequence in range(batch):
                features = torch.mm(basis[sequence], factor[sequence].T, out=workspace[: stop - start])
                rebuilt = features.float().unflatten(-1, (heads, -1))
                planes_of(rebuilt).mul_(rotation.offsets(stop - start, query.device)[:, None])
                scores[sequence, :, :, start:stop] = queries[block][sequence] @ rebuilt.permute(1, 2, 0)
        return scores

    def stored_run(self) -> StoredRun | None:
        """See `kvgauge.attend.attention.StoredTokens`; all queries ask one basis, where no key is rebuilt."""
        if self.rotation is not None:
            return None
        bases = [space.basis.compiled() for space in (self.keys, self.values)]
        head_dims = [len(space.factors[self.member]) // self.num_key_value_heads for space in (self.keys, self.values)]
        factors = [
            space.factors[self.member].compiled(shared)
            for space, shared in zip((self.keys, self.values), head_dims, strict=True)
        ]
        if bases[0] is None or bases[1] is None or factors[0] is None or factors[1] is None:
            return None
        return StoredRun(bases[0], bases[1], factors[0][0], factors[1][0], shared=True)

    def asked(self, query: Tensor, rotation: PlaneRotation) -> Tensor:
        """Queries as planes, turned on by the first columns, where keys are turned by all of their columns."""
        planes = to_planes(query)
        return planes if self.first_columns is None else planes * rotation.phases(self.first_columns)[:, :, None]

    def mix(self, weights: Tensor) -> Tensor:
        """See `kvgauge.attend.attention.Segment`."""
        batch, heads, rows, _ = weights.shape
        factor = self.values.factors[self.member].dense()
        mixed = self.values.basis.mix(weights.flatten(1, 2)).view(batch, heads, rows, -1)
        return mixed @ factor.unflatten(1, (heads, -1)).transpose(-1, -2)

    def dense(self) -> tuple[Tensor, Tensor]:
        """(keys, values) as the model would have seen them, (batch, N, tokens, head_dim)."""
        heads = self.num_key_value_heads
        keys, values = (
            space.rebuild(self.member).unflatten(-1, (heads, -1)).transpose(1, 2) for space in (self.keys, self.values)
        )
        if self.rotation is None:
            return keys, values
        columns = torch.arange(len(self), device=keys.device)
        if self.first_columns is not None:
            columns = (columns - self.first_columns)[:, None]
        phases = self.rotation.phases(columns)
        return from_planes(planes_of(keys.float().contiguous()) * phases).to(values.dtype), values
