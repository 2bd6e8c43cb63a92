"""The benchmark of the compression factors what the cache would, and every way reaches the optimum."""

from __future__ import annotations

import kvgauge
from pipelines.studies.svd_time import matrices, measure


def test_the_matrices_are_those_of_the_groups(tiny, tokens):
    method = kvgauge.build_method("xkv", group_size=3, budget=0.25)
    found = list(matrices(tiny("tiny/llama"), tokens(1, 200), method))
    assert [tuple(rows.shape) for rows, _ in found] == [(200, 96), (200, 96), (200, 32), (200, 32)]


def test_ways_and_errors(tiny, tokens):
    method = kvgauge.build_method("xkv", budget=0.25)
    result = measure(tiny("tiny/llama"), tokens(1, 200), method, repeats=1)
    assert set(result["seconds"]) == {"torch.linalg.svd", "exact", "randomized"}
    assert abs(result["excess"]["exact"]) < 1e-5
    assert -1e-5 < result["excess"]["randomized"] < 0.01
    assert result["speedup"]["torch.linalg.svd"] == 1.0
