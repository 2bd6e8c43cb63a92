"""What is counted while entries are merged."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Tally:
    """What happened to the entries of a layer so far.

    Attributes:
        merges: one for every sequence, kv-head and new entry.
        guarded: those of them whose weights had to be replaced, see `kvgauge.methods.merging.merge_keys.key_weights`.
        most_entries: of any row at any time.
    """

    merges: int = 0
    guarded: int = 0
    most_entries: int = 0

    def add(self, other: Tally) -> None:
        """What happened elsewhere to entries that are now here."""
        self.merges += other.merges
        self.guarded += other.guarded
        self.most_entries = max(self.most_entries, other.most_entries)
