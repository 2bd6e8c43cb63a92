"""Merging chosen runs of adjacent entries into one each: keys, values, cardinalities and what the rules remember.

Keys are kept rotated to their positions, the running sums of the cardinalities before them. The rotation is linear, so
merging keys before it (pre-RoPE, as the papers do) is merging them rotated to one common position: each key is turned
by the difference between the position of its new entry and its own, and nothing else is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvgauge.architecture.rotary import Rotary
from kvgauge.methods.merging.merge_keys import (
    hessian_diagonal,
    hessian_row_sums,
    key_weights,
    mix_segments,
    of_segment,
    segment_sums,
    value_deltas,
)
from kvgauge.methods.merging.merge_pairs import place_in_run

RULES = ("mean", "hessian", "fisher", "gradient")


@dataclass
class Entries:
    """The entries of one layer; rows end at the last entry, shorter ones start later (cardinality 0 before that).

    Attributes:
        keys: (batch, num_key_value_heads, entries, head_dim), rotated to `positions`.
        values: shaped alike, means over the tokens of an entry.
        cardinalities: (batch, entries), tokens of an entry, clipped; 0 where there is none.
        shares: (batch, num_key_value_heads, entries), mean attention of a query to the entry.
        hessian: (batch, num_key_value_heads, entries, 1 or head_dim), h_ii, or the gradient whose square it is; None
            where the rule has none.
        at_end: an entry stands at the position of its last token, else at that of its first.
        behind: (batch,), the first entry that `alphas` count, and values count as sums there; None: all, and means.
    """

    keys: Tensor
    values: Tensor
    cardinalities: Tensor
    shares: Tensor
    hessian: Tensor | None = None
    at_end: bool = False
    behind: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """(batch, entries), True where there is an entry."""
        return self.cardinalities > 0

    @property
    def positions(self) -> Tensor:
        """(batch, entries): where each entry stands, see `running_positions`."""
        return running_positions(self.cardinalities, at_end=self.at_end)

    @cached_property
    def alphas(self) -> Tensor:
        """α of the curvature, (batch, num_key_value_heads, entries): the shares, or their part behind the start."""
        shares = torch.where(self.valid[:, None], self.shares, 0.0)
        if self.behind is None:
            return shares
        places = torch.arange(shares.shape[-1], device=shares.device)
        shares = torch.where((places >= self.behind[:, None])[:, None], shares, 0.0)
        return shares / shares.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)

    @cached_property
    def deltas(self) -> Tensor:
        """``‖v_i − o‖₁`` (batch, num_key_value_heads, entries); see `value_deltas`."""
        if self.behind is None:
            return value_deltas(self.alphas, self.values)
        counts = self.cardinalities[:, None, :, None].to(self.alphas.dtype)
        return value_deltas(self.alphas, self.values.to(counts.dtype) * counts)


def running_positions(cardinalities: Tensor, *, at_end: bool = False) -> Tensor:
    """(batch, entries): the sum of the cardinalities before each entry, or before its last token.

    Args:
        cardinalities: (batch, entries), 0 where there is no entry.
        at_end: of the last token of an entry, not of its first.
    """
    ends = cardinalities.cumsum(dim=1)
    return (ends - 1).clamp(min=0) if at_end else ends - cardinalities


def current_hessian(entries: Entries) -> Tensor:
    """KVSlimmer's h_ii of the present shares and values, (batch, num_key_value_heads, entries, 1)."""
    return hessian_diagonal(entries.alphas, entries.deltas).unsqueeze(-1)


def averaged_hessian(now: Tensor, before: Tensor | None, windows: Tensor) -> Tensor:
    """The running mean over windows, ``now / n + before (1 − 1/n)``; entries without a past take what they have now.

    Args:
        now: (batch, heads, entries, 1 or head_dim).
        before: shaped alike, not a number where an entry has no past; None where no entry has.
        windows: (batch,), n: windows so far, this one included.
    """
    if before is None:
        return now
    share = (1.0 / windows.to(now.dtype))[:, None, None, None]
    return torch.where(before.isnan(), now, now * share + before * (1.0 - share))


def merge(
    entries: Entries, pairs: Tensor, rule: str, clip: int | None, rotary: Rotary
) -> tuple[Entries, Tensor, Tensor]:
    """Merge every run of chosen pairs into one entry.

    Args:
        entries: of one layer; with a Hessian, if the rule has one.
        pairs: (batch, entries − 1), True where an entry is merged with the next.
        rule: one of `RULES`: how the keys are weighed.
        clip: largest cardinality that is remembered, or None. Values are sums over an entry's tokens divided by the
            cardinality, as in the papers' codes: what is clipped weighs more in the output, not less.
        rotary: of the model.

    Returns:
        The new entries, as many as the longest row has; how many (head, entry) merges each row made (batch,); and in
        how many of them the guard of `key_weights` stepped in (batch,).
    """
    valid = entries.valid
    opens = valid.clone()
    opens[:, 1:] &= ~(pairs & valid[:, :-1])
    kept = opens.sum(dim=1)
    count = int(kept.max())
    # Rows stay aligned at their ends. Empty places have no weight in any sum; they share the first segment.
    segments = (opens.cumsum(dim=1) - 1 + (count - kept)[:, None]).clamp(min=0)
    sizes = torch.zeros_like(kept)[:, None].repeat(1, count).scatter_add_(1, segments, valid.long())

    shares = torch.where(valid[:, None], entries.shares, 0.0)
    total = segment_sums(entries.cardinalities[:, None], segments, count)[:, 0]
    cardinalities = total if clip is None else total.clamp(max=clip)
    merged = Entries(
        entries.keys, entries.values, cardinalities, segment_sums(shares, segments, count), at_end=entries.at_end
    )

    row_sums, hessian = _row_sums(entries, segments, count, rule)
    weights, guarded = key_weights(row_sums, shares, entries.cardinalities, segments, sizes)
    weights = torch.where(valid[:, None, :, None], weights, 0.0)
    merged.keys = _merge_keys(entries, weights, merged.positions, segments, rotary)
    if hessian is not None:
        parts = hessian if rule == "gradient" else torch.where(weights == 0, 0.0, weights**2 * hessian)
        merged.hessian = segment_sums(torch.where(valid[:, None, :, None], parts, 0.0), segments, count)

    new = merged.cardinalities.gather(1, segments).clamp(min=1)
    portions = (entries.cardinalities.to(shares.dtype) / new)[:, None]
    merged.values = mix_segments(entries.values, portions, segments, count)
    merges = (sizes > 1).sum(dim=1) * entries.keys.shape[1]
    return merged, merges, guarded.sum(dim=(1, 2))


def _row_sums(entries: Entries, segments: Tensor, count: int, rule: str) -> tuple[Tensor, Tensor | None]:
    """r_i of `key_weights`, and the diagonal that the merged entries inherit."""
    if rule == "mean":
        return torch.ones_like(entries.shares).unsqueeze(-1), None
    hessian = entries.hessian
    if hessian is None:
        raise RuntimeError(f"the {rule} rule needs the diagonal of a Hessian")
    if rule == "fisher":
        return hessian, hessian
    if rule == "gradient":
        return hessian.square(), hessian
    sums = hessian_row_sums(hessian.squeeze(-1), entries.alphas, entries.deltas, segments, count)
    return sums.unsqueeze(-1), hessian


def _merge_keys(entries: Entries, weights: Tensor, positions: Tensor, segments: Tensor, rotary: Rotary) -> Tensor:
    count = positions.shape[1]
    if weights.shape[-1] == 1:
        turning = rotary.turning(positions.gather(1, segments) - entries.positions, entries.keys)
        return mix_segments(entries.keys, weights.squeeze(-1), segments, count, turning)
    # Weights per coordinate do not commute with the rotation: these keys are turned back, weighed, and turned again.
    plain = rotary.shift(entries.keys.to(weights.dtype), -entries.positions) * weights
    return rotary.shift(segment_sums(plain, segments, count), positions).to(entries.keys.dtype)


def evict(entries: Entries, first: Tensor, count: Tensor, rotary: Rotary) -> Entries:
    """Remove `count` entries of every row from entry `first` on; those behind them move up.

    Args:
        entries: of one layer.
        first: (batch,).
        count: (batch,).
        rotary: of the model.
    """
    places = torch.arange(entries.cardinalities.shape[1], device=first.device)
    gone = (places >= first[:, None]) & (places < (first + count)[:, None])
    return remove(entries, gone, rotary)


def remove(entries: Entries, gone: Tensor, rotary: Rotary) -> Entries:
    """Remove the entries that `gone` (batch, entries) names; those behind them move up."""
    keep = entries.valid & ~gone
    kept = align(entries, keep)
    before = entries.positions.gather(1, _order(keep)[:, -kept.cardinalities.shape[1] :])
    shift = torch.where(kept.valid, kept.positions - before, 0)
    kept.keys = rotary.shift(kept.keys, shift)
    return kept


def drop_overlaps(entries: Entries, pairs: Tensor, rotary: Rotary) -> tuple[Entries, Tensor]:
    """Of every run of chosen pairs the first two entries stay a pair, and the others vanish.

    That is what the published codes of KVSlimmer and AsymKV do: all pairs are merged from the entries as they were, and
    then the second entry of every pair is deleted, be it a merged one or not.

    Args:
        entries: of one layer.
        pairs: (batch, entries − 1), True where an entry is merged with the next.
        rotary: of the layer.

    Returns:
        The entries that are left, and their pairs, of which no two overlap.
    """
    place = place_in_run(pairs)
    keep = entries.valid & (place < 2)
    kept = remove(entries, place >= 2, rotary)
    order = _order(keep)[:, -kept.cardinalities.shape[1] :]
    return kept, ((place == 1) & entries.valid).gather(1, order)[:, 1:] & kept.valid[:, 1:]


def align(entries: Entries, keep: Tensor) -> Entries:
    """The entries that `keep` (batch, entries) names, each row ending at the last column."""
    count = int(keep.sum(dim=1).max())
    order = _order(keep)[:, -count:] if count else _order(keep)[:, :0]
    stays = keep.gather(1, order)
    return Entries(
        of_segment(entries.keys, order),
        of_segment(entries.values, order),
        torch.where(stays, entries.cardinalities.gather(1, order), 0),
        of_segment(entries.shares, order),
        None if entries.hessian is None else of_segment(entries.hessian, order),
        entries.at_end,
    )


def _order(keep: Tensor) -> Tensor:
    """Places of the entries that go, then of those that stay, each in their order."""
    return keep.int().argsort(dim=1, stable=True)
