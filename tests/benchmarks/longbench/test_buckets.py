import pytest

from kvgauge.benchmarks.longbench.buckets import BUCKETS, bucket_of


@pytest.mark.parametrize(
    ("words", "label"),
    [(0, "0-4k"), (3_999, "0-4k"), (4_000, "4-8k"), (7_999, "4-8k"), (8_000, "8k+"), (60_000, "8k+")],
)
def test_bounds_are_those_of_the_official_scorer(words, label):
    assert bucket_of(words).label == label


def test_numbers_that_stand_for_buckets_keep_their_order():
    lengths = [bucket.length for bucket in BUCKETS]
    assert lengths == sorted(set(lengths))
