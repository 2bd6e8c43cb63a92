"""LongBench-E's length intervals (arXiv 2308.14508; the official scorer's bounds)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bucket:
    """Samples of similar length.

    Attributes:
        label: as the paper prints it.
        low: least number of words of the dataset's own count.
        length: what stands for the bucket where a number is needed, as in tables with one row per length: the upper
            bound, in words, which does not belong to the bucket. The last bucket is open above; its number is twice
            its lower bound.
    """

    label: str
    low: int
    length: int


BUCKETS: tuple[Bucket, ...] = (
    Bucket("0-4k", 0, 4_000),
    Bucket("4-8k", 4_000, 8_000),
    Bucket("8k+", 8_000, 16_000),
)


def bucket_of(words: int) -> Bucket:
    """The bucket of a sample of so many words (the ``length`` field of the official files, not tokens)."""
    return max((bucket for bucket in BUCKETS if bucket.low <= words), key=lambda bucket: bucket.low)
