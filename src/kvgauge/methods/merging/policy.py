"""How many entries a layer keeps, and how it makes room for more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvgauge.errors import UserError


@dataclass(frozen=True)
class MergePolicy:
    """How many entries a layer keeps and how it makes room.

    Attributes:
        name: of the method, for error messages.
        entries: the limit for a context of so many tokens.
        start: first tokens that are never merged.
        window: tokens between merges.
        rule: one of `kvgauge.methods.merging.merge_entries.RULES`, or ``evict``.
        pairs: one of `kvgauge.methods.merging.merge_pairs.PAIRS`.
        gamma: γ of the discount, in entries.
        clip: largest cardinality, or None.
    """

    name: str
    entries: Callable[[int], int]
    start: int
    window: int
    rule: str
    pairs: str
    gamma: float
    clip: int | None

    @property
    def evicts(self) -> bool:
        """Entries are removed, not merged: nobody asks what attention they received."""
        return self.rule == "evict"

    def limit(self, tokens: int, *, sure: bool) -> int:
        """The most entries of a row for a context of `tokens` tokens.

        Args:
            tokens: of the row.
            sure: so long will the context be; else more may come, and a limit that is too low may still rise.

        Raises:
            UserError: the start alone exceeds the limit.
        """
        limit = self.entries(tokens)
        if limit > self.start or tokens <= limit:
            return limit
        if sure:
            raise UserError(
                f"{self.name} keeps {limit} entries of {tokens} tokens, and its {self.start} first "
                f"tokens stay as they are: lower start, raise the budget or give a longer context"
            )
        return self.start + 1
