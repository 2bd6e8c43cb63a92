"""Selective Reconstruction (xKV v2): per step only the most promising chunks of the context are rebuilt.

One landmark per chunk and kv-head, the mean of the chunk's exact post-RoPE keys, stands for the chunk; every kv-head
picks its own chunks by the attention its query heads would pay to the landmarks. Chunks are aligned at the end of the
context, so that left padding does not move them; each sequence's first chunk, which holds the attention sink, is always
among the chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvgauge.architecture.planes import interleaved, planes_of
from kvgauge.attend.mask import Mask
from kvgauge.kernels.cpu.gather_rows import gather_rows, turned_rows
from kvgauge.kernels.cpu.stored_rows import TOKEN_CODES
from kvgauge.methods.across_layers.subspace import SharedSubspace
from kvgauge.methods.across_layers.subspace_segment import SubspaceSegment


@dataclass(frozen=True)
class ChunkSelection:
    """How many tokens are rebuilt per step.

    Attributes:
        chunk: tokens that one landmark stands for.
        budget: tokens of the context that a kv-head attends to; whole chunks, at least one.
    """

    chunk: int
    budget: int

    @property
    def chosen(self) -> int:
        """Chunks that a kv-head attends to."""
        return max(1, self.budget // self.chunk)

    def count(self, tokens: int) -> int:
        """Chunks of a context; the first one may be shorter than the others."""
        return -(-tokens // self.chunk)

    def landmarks(self, keys: Tensor, valid: Tensor | None) -> Tensor:
        """Means of the valid keys of each chunk: (batch, heads, chunks, head_dim) from (…, tokens, head_dim)."""
        missing = self.count(keys.shape[2]) * self.chunk - keys.shape[2]
        if valid is None:
            valid = keys.new_ones(keys.shape[0], keys.shape[2], dtype=torch.bool)
        seen = torch.nn.functional.pad(valid[:, : keys.shape[2]], (missing, 0)).to(keys.dtype)
        padded = torch.nn.functional.pad(keys, (0, 0, missing, 0)) * seen[:, None, :, None]
        counts = seen.unflatten(1, (-1, self.chunk)).sum(dim=2)[:, None, :, None]
        return padded.unflatten(2, (-1, self.chunk)).sum(dim=3) / counts.clamp_min(1)

    def choose(
        self, query: Tensor, landmarks: Tensor, first_columns: Tensor | None, tokens: int, scaling: float
    ) -> Tensor:
        """First columns (batch, num_key_value_heads, chosen) of the chunks to attend to.

        Args:
            query: (batch, num_attention_heads, 1, head_dim).
            landmarks: (batch, num_key_value_heads, chunks, head_dim).
            first_columns: (batch, 1), where the sequences begin; None: all at 0.
            tokens: of the basis. The first column of a shorter first chunk is negative, above −chunk.
            scaling: factor on the scores.
        """
        batch, heads, chunks, _ = landmarks.shape
        grouped = query.reshape(batch, heads, -1, query.shape[-1]) * scaling
        starts = torch.arange(tokens - chunks * self.chunk, tokens, self.chunk, device=query.device)
        scores = (grouped @ landmarks.transpose(-1, -2)).float()
        if first_columns is None:
            promise = scores.softmax(dim=-1).sum(dim=2)
            promise[:, :, 0] = torch.inf
        else:
            empty = starts + self.chunk <= first_columns  # (batch, chunks): nothing but padding
            first = ~empty & (starts <= first_columns)
            promise = scores.masked_fill(empty[:, None, None], -torch.inf).softmax(dim=-1).sum(dim=2)
            promise = promise.masked_fill(first[:, None], torch.inf).masked_fill(empty[:, None], -1.0)
        return starts[promise.topk(self.chosen, dim=-1, sorted=False).indices]


class SelectedSegment:
    """The chosen chunks of a layer as a segment of attention: each kv-head has its own tokens.

    Args:
        source: all tokens of the layer.
        starts: from `ChunkSelection.choose`.
        chunk: tokens of a chunk.
        mask: of the one query, and of all tokens from the layer's first on.
    """

    def __init__(self, source: SubspaceSegment, starts: Tensor, chunk: int, mask: Mask) -> None:
        self.source, self.starts, self.chunk = source, starts, chunk
        self.num_key_value_heads = source.num_key_value_heads
        columns = (starts.unsqueeze(-1) + torch.arange(chunk, device=starts.device)).flatten(2)
        shorter = len(source) % chunk != 0  # the first chunk then has columns that do not exist
        self.columns = columns.clamp_min(0) if shorter else columns  # (batch, heads, entries)
        self.missing = columns < 0 if shorter else None
        self.mask = mask.picked(self.columns)

    def __len__(self) -> int:
        return self.columns.shape[2]

    def scores(self, query: Tensor) -> Tensor:
        """See `kvgauge.attend.attention.Segment`."""
        keys, rotation = self.source.keys, self.source.rotation
        coded = self._coded(keys)
        if coded is not None:
            return self._hidden(self._coded_scores(query, *coded).to(query.dtype))
        factor = keys.factors[self.source.member].dense().unflatten(1, (query.shape[1], -1))
        rows = self._rows(keys.basis.dense())
        if rotation is None:
            scores = (query @ factor) @ rows.transpose(-1, -2)
        else:
            rebuilt = (rows @ factor.transpose(-1, -2)).float()
            planes_of(rebuilt).mul_(rotation.looked_up(self.columns, len(self.source)))
            asked = interleaved(self.source.asked(query, rotation))
            scores = (asked @ rebuilt.transpose(-1, -2)).to(query.dtype)
        return self._hidden(scores)

    def _coded_scores(self, query: Tensor, rows: Tensor, factor: Tensor) -> Tensor:
        """Scores of codes: the chosen rows, and the factor, as in `_coded`."""
        rotation = self.source.rotation
        if rotation is None:
            return (query.float() @ factor.mT) @ rows
        rebuilt = (rows.mT @ factor).contiguous()
        planes_of(rebuilt).mul_(rotation.looked_up(self.columns, len(self.source)))
        return interleaved(self.source.asked(query, rotation)) @ rebuilt.mT

    def _hidden(self, scores: Tensor) -> Tensor:
        self.mask.apply_(scores)
        if self.missing is not None:
            scores.masked_fill_(self.missing[:, :, None], torch.finfo(scores.dtype).min)
        return scores

    def mix(self, weights: Tensor) -> Tensor:
        """See `kvgauge.attend.attention.Segment`."""
        values = self.source.values
        coded = self._coded(values)
        if coded is not None:
            return ((weights.float() @ coded[0].mT) @ coded[1]).to(weights.dtype)
        factor = values.factors[self.source.member].dense().unflatten(1, (weights.shape[1], -1))
        return (weights @ self._rows(values.basis.dense())) @ factor.transpose(-1, -2)

    def _coded(self, space: SharedSubspace) -> tuple[Tensor, Tensor] | None:
        """The chosen rows of a basis in codes (batch, heads, rank, entries), and the factor (batch, heads, rank, d).

        None where the kernel that gathers them does not know their form. Nothing else of the basis is dequantised.
        """
        bases, factors = space.basis.compiled(), space.factors[self.source.member].compiled()
        if bases is None or factors is None or len(bases) > 1 or bases[0].kind != TOKEN_CODES:
            return None
        rows, factor = gather_rows(bases[0], self.starts, self.chunk), turned_rows(factors[0], self.starts.shape[0])
        if rows is None or factor is None:
            return None
        return rows, factor.unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)

    def _rows(self, basis: Tensor) -> Tensor:
        """The basis at the chosen columns: (batch, heads, entries, rank)."""
        picked = basis.new_empty(*self.columns.shape, basis.shape[-1])
        for rows, columns, target in zip(basis, self.columns, picked.flatten(1, 2), strict=True):
            torch.index_select(rows, 0, columns.flatten(), out=target)
        return picked
