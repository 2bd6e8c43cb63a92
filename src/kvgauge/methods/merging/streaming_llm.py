"""StreamingLLM: attention sinks and a recent window (arXiv 2309.17453), the zero point of the merging family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvgauge.methods.merging.merging import Streaming


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Streaming):
    """The oldest entries behind the start are evicted; positions are those within the cache.

    It evicts after every window, as the merging methods merge, not after every token: the queries of a window see up to
    `window` tokens more than the paper's.
    """

    name: str = "streaming_llm"

    rule: ClassVar[str] = "evict"
