"""Answers of hundreds to thousands of tokens that can be checked line by line."""

from kvgauge.benchmarks.long_answer.long_answer import LongAnswer

__all__ = ["LongAnswer"]
