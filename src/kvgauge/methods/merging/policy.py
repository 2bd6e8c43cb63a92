"""How many entries a layer keeps, and how it makes room for more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvgauge.errors import UserError
from kvgauge.methods.merging.traits import Traits


@dataclass(frozen=True)
class MergePolicy:
    """How many entries a layer keeps and how it makes room.

    Attributes:
        name: of the method, for error messages.
        entries: the most that are left of a context of so many tokens.
        start: first tokens that are never merged.
        window: tokens between merges.
        rule: one of `kvgauge.methods.merging.merge_entries.RULES`, or ``evict``.
        traits: how the layer chooses pairs, and what becomes of them.
        gamma: γ of the discount, in entries.
        clip: largest cardinality, or None.
    """

    name: str
    entries: Callable[[int], int]
    start: int
    window: int
    rule: str
    traits: Traits
    gamma: float
    clip: int | None

    @property
    def evicts(self) -> bool:
        """Entries are removed, not merged: nobody asks what attention they received."""
        return self.rule == "evict"

    @property
    def ahead(self) -> bool:
        """The next window's queries decide what is merged, and the newest window is not."""
        return self.traits.decided_by == "next"

    def newest(self, tokens: int) -> int:
        """Tokens of the last window of a context, where that stands outside the limit; else 0."""
        return newest_window(tokens, self.window) if self.ahead else 0

    def limit(self, tokens: int, *, sure: bool) -> int:
        """The most entries of a row that may be merged, for a context of `tokens` tokens; the start is among them.

        Args:
            tokens: of the row.
            sure: so long will the context be; else more may come, and a limit that is too low may still rise.

        Raises:
            UserError: the start alone exceeds the limit.
        """
        entries, newest = self.entries(tokens), self.newest(tokens)
        limit = entries - newest
        if limit > self.start or tokens <= entries:
            return max(limit, 0)
        if sure:
            last = f", as do the {newest} tokens of the last window" if newest else ""
            raise UserError(
                f"{self.name} keeps {entries} entries of {tokens} tokens, and its {self.start} first "
                f"tokens stay as they are{last}: lower start{' or window' if newest else ''}, "
                f"raise the budget or give a longer context"
            )
        return self.start + 1


def newest_window(tokens: int, window: int) -> int:
    """Tokens of the last of the windows that a context is read in."""
    return (tokens - 1) % window + 1 if tokens else 0
