"""How a cache grows while an answer is written: bytes and seconds, step by step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import Cache

from kvgauge.layers.cache import KVCache

STEPS = 32  # of an answer's beginning, and of its end, whose times are taken together


@dataclass
class Growth:
    """Watches one answer being written; called after every forward pass of its decoding.

    Attributes:
        cache: that grows.
        now: seconds, when all that was asked of the device is done.
        points: tokens in the cache and bytes of all sequences, where the bytes changed; the beginning comes first.
        steps: seconds of every forward pass.
    """

    cache: Cache
    now: Callable[[], float] = time.perf_counter
    points: list[tuple[int, int]] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._seen = self._recompressed()
        self._note(self.cache.get_seq_length())
        self._last = self.now()

    def __call__(self) -> None:
        now = self.now()
        self.steps.append(now - self._last)
        tokens = self.cache.get_seq_length()
        again = self.cache.recompressions[self._seen :] if isinstance(self.cache, KVCache) else []
        for one in again:  # the bytes rose in this pass before they fell
            self._append(one.tokens, one.before)
        self._seen += len(again)
        self._note(tokens)
        self._last = self.now()

    def _recompressed(self) -> int:
        return len(self.cache.recompressions) if isinstance(self.cache, KVCache) else 0

    def _note(self, tokens: int) -> None:
        if isinstance(self.cache, KVCache):
            self._append(tokens, self.cache.nbytes())

    def _append(self, tokens: int, nbytes: int) -> None:
        if not self.points or self.points[-1][1] != nbytes:
            self.points.append((tokens, nbytes))

    def whole(self) -> list[tuple[int, int]]:
        """`points`, up to the present."""
        end = (self.cache.get_seq_length(), self.points[-1][1])
        return [*self.points, *([end] if self.points[-1][0] < end[0] else [])]

    def peak(self) -> int:
        """Most bytes of all sequences at any time."""
        return max(nbytes for _, nbytes in self.points)

    def seconds(self) -> dict[str, Any]:
        """Median seconds of a pass at the answer's beginning and at its end; empty for answers of a few tokens."""
        if len(self.steps) < 2 * STEPS:
            return {}
        return {
            "step_at_start": statistics.median(self.steps[:STEPS]),
            "step_at_end": statistics.median(self.steps[-STEPS:]),
        }
