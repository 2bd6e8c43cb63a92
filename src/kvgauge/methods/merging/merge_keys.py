"""What becomes of the keys of merged entries.

A merged key minimises a quadratic form in the distances to the keys that it replaces,
``Σ_ij h_ij ⟨k − k_i, k − k_j⟩``; its minimiser is ``k = Σ r_i k_i / Σ r_i`` with the row sums ``r_i = Σ_j h_ij``.
The rules differ in h:

- plain averaging: ``h_ij`` is the identity;
- KVSlimmer (arXiv 2603.00907): the second derivatives of ``gᵀo`` in the scores, with the share α of the attention,
  the output ``o = Σ α_i v_i`` and ``δ_i = gᵀ(v_i − o)``: ``h_ii = α_i (1 − 2 α_i) δ_i``,
  ``h_ij = −α_i α_j (δ_i + δ_j)``, where ``‖v_i − o‖₁`` stands for δ_i, so that no gradient is needed;
- AsymKV (arXiv 2506.05410): the diagonal of the Fisher information, the squared gradient of the loss in every
  coordinate of the key, and no ``h_ij``.

For two entries the second is the paper's ``((h_11 + h_12) k_1 + (h_22 + h_12) k_2) / (h_11 + 2 h_12 + h_22)``; for a
chain of more it is the minimiser of the same form over all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvgauge.architecture.rotary import turn
from kvgauge.kernels.cpu.segment_mix import segment_mix

# Σ r below this share of Σ |r| is too near to zero to divide by: the merged key would lie far from all it replaces.
MIN_DENOMINATOR = 1e-3


def hessian_diagonal(shares: Tensor, deltas: Tensor) -> Tensor:
    """``h_ii = α_i (1 − 2 α_i) δ_i`` for shares and deltas of one shape."""
    return shares * (1.0 - 2.0 * shares) * deltas


def hessian_off_diagonal(share_i: Tensor, share_j: Tensor, delta_i: Tensor, delta_j: Tensor) -> Tensor:
    """``h_ij = −α_i α_j (δ_i + δ_j)``."""
    return -share_i * share_j * (delta_i + delta_j)


def value_deltas(shares: Tensor, values: Tensor) -> Tensor:
    """``‖v_i − o‖₁`` with ``o = Σ α_i v_i``, the stand-in for ``gᵀ(v_i − o)`` that needs no gradient.

    Args:
        shares: (batch, num_key_value_heads, entries); brought to the sum 1 here.
        values: (batch, num_key_value_heads, entries, head_dim), means over an entry's tokens.

    Returns:
        (batch, num_key_value_heads, entries).
    """
    values = values.to(shares.dtype)
    total = shares.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)
    output = (shares / total).unsqueeze(2) @ values
    return (values - output).abs().sum(dim=-1)


def segment_sums(rows: Tensor, segments: Tensor, count: int) -> Tensor:
    """Sums over the entries of each segment.

    Args:
        rows: (batch, heads, entries) or (batch, heads, entries, dimension).
        segments: (batch, entries), the segment of each entry, below `count`.
        count: segments.

    Returns:
        As `rows`, with `count` in the place of the entries.
    """
    index = segments[:, None] if rows.dim() == 3 else segments[:, None, :, None]
    shape = (*rows.shape[:2], count, *rows.shape[3:])
    return rows.new_zeros(shape).scatter_add_(2, index.expand_as(rows), rows)


def mix_segments(
    rows: Tensor, weights: Tensor, segments: Tensor, count: int, turning: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Weighted sums over the rows of each segment, turned before if `turning` says by how much.

    Args:
        rows: (batch, heads, entries, dimension).
        weights: (batch, heads or 1, entries), float32 at least.
        segments, count: as in `segment_sums`; segments never fall.
        turning: of `kvgauge.architecture.rotary.Rotary.turning`, or None.

    Returns:
        (batch, heads, count, dimension) in the dtype of `rows`, summed in that of the weights.
    """
    mixed = segment_mix(rows, weights, segments, count, turning)
    if mixed is not None:
        return mixed
    exact = rows.to(weights.dtype)
    exact = exact if turning is None else turn(exact, turning)
    return segment_sums(exact * weights.unsqueeze(-1), segments, count).to(rows.dtype)


def of_segment(sums: Tensor, segments: Tensor) -> Tensor:
    """For each entry what belongs to its segment: the transpose of `segment_sums`."""
    index = segments[:, None] if sums.dim() == 3 else segments[:, None, :, None]
    return sums.gather(2, index.expand(*sums.shape[:2], -1, *sums.shape[3:]))


def hessian_row_sums(diagonal: Tensor, shares: Tensor, deltas: Tensor, segments: Tensor, count: int) -> Tensor:
    """``r_i = h_ii + Σ_j h_ij`` over the other entries j of the segment, without a matrix.

    ``Σ_j h_ij = −α_i (δ_i Σ_j α_j + Σ_j α_j δ_j)``.

    Args:
        diagonal: h_ii (batch, heads, entries).
        shares, deltas: of the off-diagonal part, shaped alike.
        segments, count: as in `segment_sums`.
    """
    moment = shares * deltas
    other_shares = of_segment(segment_sums(shares, segments, count), segments) - shares
    other_moments = of_segment(segment_sums(moment, segments, count), segments) - moment
    return diagonal - shares * (deltas * other_shares + other_moments)


def key_weights(
    row_sums: Tensor, shares: Tensor, cardinalities: Tensor, segments: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """The weights ``r_i / Σ r`` of the keys of every segment, and where they had to be replaced.

    Where ``Σ r`` is not positive, or too near to zero, or not a number, the weights are the shares of the attention,
    and where there was none, the cardinalities.

    Args:
        row_sums: r (batch, heads, entries, 1 or head_dim).
        shares: (batch, heads, entries).
        cardinalities: (batch, entries).
        segments: (batch, entries).
        sizes: (batch, segments), entries of each segment.

    Returns:
        The weights, shaped as `row_sums`, exactly 1 for an entry alone; and (batch, heads, segments), True where a
        segment of two and more was guarded in any coordinate.
    """
    count = sizes.shape[1]
    together = sizes > 1
    merged = together.gather(1, segments)[:, None, :, None]
    row_sums = torch.where(merged, row_sums, 1.0)
    total = segment_sums(row_sums, segments, count)
    scale = segment_sums(row_sums.abs(), segments, count)
    guarded = ~(total > MIN_DENOMINATOR * scale)  # also True for what is not a number
    fallback = shares.clamp(min=0.0)
    unseen = of_segment(segment_sums(fallback, segments, count), segments) <= 0
    fallback = torch.where(unseen, cardinalities[:, None].to(fallback.dtype), fallback)
    fallback = (fallback / of_segment(segment_sums(fallback, segments, count), segments)).unsqueeze(-1)
    weights = row_sums / of_segment(total, segments)
    weights = torch.where(of_segment(guarded, segments), fallback, weights)
    return torch.where(merged, weights, 1.0), guarded.any(dim=-1) & together[:, None]
