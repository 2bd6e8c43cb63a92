"""InfiniteBench (Zhang et al., arXiv 2402.13718): retrieval, books, dialogues, code and numbers over 100K tokens."""

from kvgauge.benchmarks.infinitebench.infinitebench import InfiniteBench

__all__ = ["InfiniteBench"]
