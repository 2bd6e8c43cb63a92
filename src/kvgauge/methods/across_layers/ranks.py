"""From a byte budget to the ranks of every group of layers."""

from __future__ import annotations

from collections.abc import Sequence


def group_ranks(numbers: float, tokens: int, features: Sequence[int], subspaces: int = 1) -> list[int]:
    """The ranks of every group, so that bases and factors hold at most `numbers` numbers, as many as possible.

    A rank of a group of F features costs ``tokens + F`` numbers: a column of the basis and one of the factors. Groups
    get the same share of their exact size; what rounding leaves over buys further ranks, one group at a time. At least
    rank 1 is given to every subspace, also where the budget does not pay for it.

    Args:
        numbers: what the budget pays for.
        tokens: of the context.
        features: of the joined layers, per group.
        subspaces: that a group has; the result is the sum of their ranks.
    """
    costs = [tokens + size for size in features]
    limits = [subspaces * max(1, min(tokens, size)) for size in features]
    ideal = [numbers * size / sum(features) / cost for size, cost in zip(features, costs, strict=True)]
    ranks = [max(subspaces, min(int(share + 1e-9), limit)) for share, limit in zip(ideal, limits, strict=True)]
    rest = numbers - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    for group in sorted(range(len(ranks)), key=lambda group: ranks[group] - ideal[group]):
        if costs[group] <= rest and ranks[group] < limits[group]:
            ranks[group] += 1
            rest -= costs[group]
    return ranks


def split(total: int, limit: int, key_share: float) -> tuple[int, int]:
    """`total` ranks as (rank_k, rank_v), each 1 … limit: what the keys cannot use goes to the values, and back."""
    keys = min(max(round(key_share * total), 1, total - limit), limit, total - 1)
    return keys, total - keys
