"""From a byte budget to the ranks of every group of layers."""

from __future__ import annotations

from collections.abc import Sequence


def budget_group_ranks(numbers: float, tokens: int, features: Sequence[int], key_share: float) -> list[tuple[int, int]]:
    """(rank_k, rank_v) of every group, so that bases and factors hold at most `numbers` numbers, as many as possible.

    A rank of a group of F features costs ``tokens + F`` numbers: a column of the basis and one of the factors. Groups
    get the same share of their exact size; what rounding leaves over buys further ranks, one group at a time. At least
    rank 1 is given to every group, also where the budget does not pay for it.

    Args:
        numbers: what the budget pays for.
        tokens: of the context.
        features: ``G · num_key_value_heads · head_dim`` of every group.
        key_share: part of a group's ranks that the keys get; what they cannot use goes to the values, and vice versa.
    """
    costs = [tokens + size for size in features]
    limits = [max(1, min(tokens, size)) for size in features]
    ideal = [numbers * size / sum(features) / cost for size, cost in zip(features, costs, strict=True)]
    sums = [max(2, min(int(share + 1e-9), 2 * limit)) for share, limit in zip(ideal, limits, strict=True)]
    rest = numbers - sum(total * cost for total, cost in zip(sums, costs, strict=True))
    by_need = sorted(range(len(sums)), key=lambda group: sums[group] - ideal[group])
    for group in by_need:
        if costs[group] <= rest and sums[group] < 2 * limits[group]:
            sums[group] += 1
            rest -= costs[group]
    return [split(total, limit, key_share) for total, limit in zip(sums, limits, strict=True)]


def split(total: int, limit: int, key_share: float) -> tuple[int, int]:
    """`total` ranks as (rank_k, rank_v), each 1 … limit."""
    keys = min(max(round(key_share * total), 1, total - limit), limit, total - 1)
    return keys, total - keys
