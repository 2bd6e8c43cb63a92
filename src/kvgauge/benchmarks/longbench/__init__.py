"""LongBench and LongBench-E (Bai et al., arXiv 2308.14508): 21 datasets, the official prompts, scores and averages."""

from kvgauge.benchmarks.longbench.averages import averages
from kvgauge.benchmarks.longbench.buckets import BUCKETS, Bucket, bucket_of
from kvgauge.benchmarks.longbench.datasets import DATASETS, Dataset, dataset_of
from kvgauge.benchmarks.longbench.longbench import LongBench
from kvgauge.benchmarks.longbench.metrics import score
from kvgauge.benchmarks.longbench.sample import load

__all__ = [
    "BUCKETS",
    "Bucket",
    "DATASETS",
    "Dataset",
    "LongBench",
    "averages",
    "bucket_of",
    "dataset_of",
    "load",
    "score",
]
