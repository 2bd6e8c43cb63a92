"""Weighted k-means against the dense optimum, found by trying every partition of the sorted values."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from kvgauge.store.weighted_kmeans import weighted_kmeans


def cost(values, weights, centroids):
    distances = (values.double()[..., None] - centroids.double()[..., None, :]).square().amin(-1)
    return (weights.double() * distances).sum(-1)


def optimum(values, weights, count):
    """The smallest cost of any partition of one row into `count` intervals."""
    values, order = values.double().sort()
    weights = weights.double()[order]
    best = float("inf")
    for cuts in combinations(range(1, len(values)), count - 1):
        total = 0.0
        for start, stop in zip((0, *cuts), (*cuts, len(values)), strict=True):
            part, mass = values[start:stop], weights[start:stop]
            mean = (part * mass).sum() / mass.sum()
            total += float((mass * (part - mean).square()).sum())
        best = min(best, total)
    return best


def test_close_to_the_best_partition():
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    values = torch.randn(20, 14, generator=generator)
    weights = torch.rand(20, 14, generator=generator) + 0.05
    found = cost(values, weights, weighted_kmeans(values, weights, 3))
    best = torch.tensor([optimum(row, mass, 3) for row, mass in zip(values, weights, strict=True)])
    assert bool((found >= best * (1 - 1e-6)).all())
    assert float(found.sum() / best.sum()) < 1.2


def test_no_worse_than_the_library_on_long_rows():
    values = torch.randn(3, 4000).pow(3)
    weights = torch.rand(3, 4000).square()
    found = cost(values, weights, weighted_kmeans(values, weights, 16))
    for row in range(3):
        library = KMeans(16, n_init=3, random_state=0).fit(
            np.asarray(values[row][:, None]), sample_weight=np.asarray(weights[row])
        )
        assert float(found[row]) < 1.1 * library.inertia_


def test_centroids_are_the_weighted_means_of_what_is_nearest():
    values, weights = torch.randn(5, 300), torch.rand(5, 300)
    centroids = weighted_kmeans(values, weights, 6)
    nearest = (values[..., None] - centroids[:, None]).abs().argmin(-1)
    for cluster in range(6):
        mass = weights * (nearest == cluster)
        torch.testing.assert_close((mass * values).sum(1) / mass.sum(1), centroids[:, cluster], rtol=1e-3, atol=1e-4)


def test_rows_do_not_meet():
    values, weights = torch.randn(4, 50), torch.rand(4, 50)
    together = weighted_kmeans(values, weights, 4)
    alone = torch.cat([weighted_kmeans(values[row : row + 1], weights[row : row + 1], 4) for row in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", [torch.zeros(1, 3), torch.ones(1, 3)])
def test_fewer_values_than_centroids(weights):
    centroids = weighted_kmeans(torch.tensor([[2.0, -1.0, 5.0]]), weights, 8)
    assert bool((centroids.diff() >= 0).all())
    for value in (2.0, -1.0, 5.0):
        assert float((centroids - value).abs().min()) < 1e-6
