"""Rotations by column are what the model does, undo each other, and split into blocks and offsets."""

from __future__ import annotations

import torch

from kvgauge.architecture.frequencies import rotary_frequencies
from kvgauge.architecture.planes import BLOCK, PlaneRotation, from_planes, interleaved, planes_of, to_planes
from kvgauge.architecture.rotary import Rotary


def test_it_is_the_models_rotation(tiny):
    model = tiny("tiny/llama")
    rotation = PlaneRotation(rotary_frequencies(model))
    keys, columns = torch.randn(1, 2, 50, 16), torch.arange(50)
    turned = from_planes(to_planes(keys) * rotation.phases(columns))
    torch.testing.assert_close(turned, Rotary(model).rotate(keys, columns[None]), atol=1e-4, rtol=1e-4)


def test_round_trip_far_out():
    rotation = PlaneRotation(torch.tensor([1.0, 0.01]))
    states, columns = torch.randn(3, 4), torch.tensor([5, 70_000, 1_000_000])
    there = to_planes(states) * rotation.phases(columns).conj()
    torch.testing.assert_close(from_planes(there * rotation.phases(columns)), states)


def test_tables_hold_the_phases():
    rotation = PlaneRotation(torch.tensor([1.0, 0.3, 1e-4]))
    columns = torch.tensor([[0, 3, BLOCK - 1], [BLOCK, 5 * BLOCK + 7, 9 * BLOCK - 1]])
    torch.testing.assert_close(rotation.looked_up(columns, 9 * BLOCK), rotation.phases(columns), atol=1e-5, rtol=0)
    assert rotation.nbytes() == (BLOCK + 10) * 3 * 8


def test_planes_and_interleaved_features_are_views_of_each_other():
    states = torch.randn(2, 5, 8)
    features = interleaved(to_planes(states)).contiguous()
    assert planes_of(features).data_ptr() == features.data_ptr()
    assert torch.equal(from_planes(planes_of(features)), states)
