"""The metrics of keys and values against dense formulas in float64."""

from __future__ import annotations

import pytest
import torch

import kvgauge
from kvgauge.architecture.facts import output_weight
from kvgauge.architecture.frequencies import rotary_frequencies
from kvgauge.architecture.planes import interleaved, to_planes
from kvgauge.calibration.whitening import (
    WEIGHT_FLOOR,
    distance_phase,
    output_moments,
    plane_order,
    roots,
    score_metrics,
    seen_from_keys,
)
from kvgauge.measure.fidelity import observe


def rotation(frequencies, position):
    """R(position), (d, d): rows are features, halves split."""
    cos, sin = (torch.diag(function(position * frequencies)) for function in (torch.cos, torch.sin))
    return torch.cat([torch.cat([cos, -sin], dim=1), torch.cat([sin, cos], dim=1)], dim=0)


@pytest.mark.parametrize("tokens", [1, 2, 37, 200])
@pytest.mark.parametrize("offset", [0, 5])
def test_the_average_over_causal_pairs_is_the_brute_force_one(tokens, offset):
    frequencies = 10_000.0 ** -torch.arange(0, 1, 1 / 6, dtype=torch.float64)
    states = torch.randn(3, 40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))
    moment = states.mT @ states
    total = torch.zeros_like(moment)
    for i in range(tokens):
        for j in range(i + 1):
            turn = rotation(frequencies, i - j + offset)
            total += turn @ moment @ turn.T
    expected = total / (tokens * (tokens + 1) / 2)
    torch.testing.assert_close(seen_from_keys(moment, frequencies, tokens, offset), expected, rtol=1e-10, atol=1e-10)


def test_the_closed_form_meets_its_series():
    tokens = 10_000
    angles = torch.logspace(-14, 0.4, 300, dtype=torch.float64)
    distances = torch.arange(tokens, dtype=torch.float64)
    weights = (tokens - distances) / (tokens * (tokens + 1) / 2)
    phases = angles[:, None] * distances
    expected = torch.complex(phases.cos() @ weights, phases.sin() @ weights)
    torch.testing.assert_close(distance_phase(angles, tokens), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(distance_phase(-angles, tokens), expected.conj(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["tiny/llama", "tiny/qwen3"])
def test_the_metric_of_cached_keys_is_the_mean_squared_score(name, tiny, tokens):
    model, ids = tiny(name), tokens(1, 60, seed=31)
    metric = score_metrics(kvgauge.collect(model, [ids]), model, "post")
    for seen in observe(model, ids):
        errors = torch.randn(seen.keys.shape, generator=torch.Generator().manual_seed(3))[0].double()
        queries = seen.queries[0].double().unflatten(0, (errors.shape[0], -1))
        scores = torch.einsum("ngtd,nsd->ngts", queries, errors) / errors.shape[-1] ** 0.5
        expected = scores.square().mean(dim=(1, 2)).sum(dim=1)
        actual = torch.einsum("nsd,nde,nse->n", errors, metric[seen.layer], errors)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


def test_the_metric_before_the_rotation_is_the_mean_over_causal_pairs_of_turned_queries(tiny, tokens):
    model, ids = tiny("tiny/llama"), tokens(1, 40, seed=32)
    moments = kvgauge.collect(model, [ids])
    metric = score_metrics(moments, model, "pre")
    frequencies = rotary_frequencies(model).double()
    heads, dim = metric.shape[1], metric.shape[-1]
    error = torch.randn(dim, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    stored = interleaved(to_planes(error))  # as xKV stores features
    for layer in range(moments.num_layers):
        for head in range(heads):
            C = moments.queries("pre")[layer, head] / (40 * 2 * dim)  # two query heads a group
            expected = 0.0
            for distance in range(40):
                turned = rotation(frequencies, distance).T @ error  # R(Δ)q · e = q · R(Δ)ᵀe
                expected += (40 - distance) * float(turned @ C @ turned)
            actual = float(stored.double() @ metric[layer, head] @ stored.double())
            assert actual == pytest.approx(expected / (40 * 41 / 2), rel=1e-5)


def test_plane_order_is_that_of_interleaved_features():
    rows = torch.randn(5, 12)
    assert torch.equal(interleaved(to_planes(rows)), rows[:, plane_order(12)])


def test_output_moments_measure_what_the_heads_add(tiny):
    model = tiny("tiny/llama")
    moments = output_moments(model)
    value = torch.randn(moments.shape[-1], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    weight = output_weight(model, 2).double()
    added = torch.stack([(value @ weight[head]).square().sum() for head in range(weight.shape[0])])
    expected = added.view(moments.shape[1], -1).sum(dim=1)
    torch.testing.assert_close(torch.einsum("d,nde,e->n", value, moments[2], value), expected)


def test_roots_are_inverse_and_tiny_eigenvalues_are_floored():
    states = torch.randn(2, 30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    root, inverse, floored = roots(states.mT @ states)
    torch.testing.assert_close(root @ root, states.mT @ states)
    torch.testing.assert_close(root @ inverse, torch.eye(8, dtype=torch.float64).expand(2, -1, -1))
    assert floored == 0
    states[:, :, 5:] = 0  # rank 5
    root, inverse, floored = roots(states.mT @ states)
    assert floored == 6
    largest = torch.linalg.eigvalsh(states.mT @ states)[:, -1]
    torch.testing.assert_close(torch.linalg.eigvalsh(root @ root)[:, 0], largest * WEIGHT_FLOOR)
