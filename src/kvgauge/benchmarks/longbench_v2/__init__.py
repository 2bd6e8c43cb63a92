"""LongBench v2 (Bai et al., arXiv 2412.15204): 503 questions with four answers to choose from over long texts."""

from kvgauge.benchmarks.longbench_v2.longbench_v2 import LongBenchV2

__all__ = ["LongBenchV2"]
