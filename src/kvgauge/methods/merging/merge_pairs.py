"""Which adjacent entries are merged: the cheapest pairs first (`kvgauge.methods.merging.merge_costs`).

Choosing many lowest pairs at once can choose pairs that overlap. Four ways to resolve that:

- ``chain`` merges every run of chosen pairs into one entry, however long it is;
- ``bounded`` merges pair by pair, in rounds, and lets no entry stand for more tokens than the clip while any other pair
  is left;
- ``disjoint`` takes the lowest pair, rules out its two neighbours, and so on;
- ``drop`` is what the published codes of KVSlimmer and AsymKV do: of a run of chosen pairs the first two entries are
  merged, and the others vanish with their keys, values and tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

PAIRS = ("chain", "bounded", "disjoint", "drop")


def choose_pairs(cost: Tensor, count: Tensor, pairs: str, within: Tensor | None = None) -> Tensor:
    """The pairs to merge at once: True where an entry is merged with the next.

    Args:
        cost: (batch, entries − 1), infinite where a pair may not be merged.
        count: (batch,), how many merges are wanted; where fewer are possible, all that are.
        pairs: one of `PAIRS`.
        within: (batch, entries − 1), True where a pair is not too large; of ``bounded``. Others are taken only in a row
            where nothing else is left.
    """
    if pairs == "bounded" and within is not None:
        small = cost.masked_fill(~within, torch.inf)
        cost = torch.where(small.isfinite().any(dim=1, keepdim=True), small, cost)
    if pairs == "disjoint":
        cost = cost.masked_fill(~disjoint(cost), torch.inf)
    chosen = (ranks(cost) < count[:, None]) & cost.isfinite()
    return chosen & disjoint(cost) if pairs == "bounded" else chosen


def place_in_run(pairs: Tensor) -> Tensor:
    """(batch, entries): 0 for an entry that opens a run of chosen pairs or is in none, 1 for the next, and so on.

    Args:
        pairs: (batch, entries − 1), True where an entry is merged with the next.
    """
    joins = torch.nn.functional.pad(pairs, (1, 0))
    places = torch.arange(joins.shape[-1], device=pairs.device).expand(joins.shape)
    return places - places.masked_fill(joins, -1).cummax(dim=-1).values


def ranks(cost: Tensor) -> Tensor:
    """The rank of every cost in its row, 0 the lowest; of equal costs the first is the lower."""
    order = cost.argsort(dim=-1, stable=True)
    places = torch.arange(cost.shape[-1], device=cost.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def disjoint(cost: Tensor) -> Tensor:
    """The pairs that a greedy matching takes, lowest cost first, no entry in two pairs.

    A pair is taken unless a cheaper neighbour is. Down a slope of costs this alternates, starting with True at the
    bottom; so a pair is taken where the numbers of steps down to the bottom are even on both sides. That is the greedy
    matching without its loop.
    """
    rank = ranks(cost)
    places = torch.arange(rank.shape[-1], device=rank.device).expand_as(rank)
    return (_descent(rank, places) % 2 == 0) & (_descent(rank.flip(-1), places).flip(-1) % 2 == 0)


def _descent(rank: Tensor, places: Tensor) -> Tensor:
    """Steps from each place down to the left until the rank rises again."""
    falls = torch.zeros_like(rank, dtype=torch.bool)
    falls[..., 1:] = rank[..., :-1] < rank[..., 1:]
    bottom = places.masked_fill(falls, -1).cummax(dim=-1).values
    return places - bottom
