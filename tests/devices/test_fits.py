"""Calibration and fits of a model on devices find what they find on the CPU."""

from __future__ import annotations

import pytest

import kvgauge
from kvgauge.simulation.machine import SimulatedMachine
from kvgauge.simulation.placing import on_devices
from kvgauge.testing import fit_on_random_tokens, relative_error
from tests.devices.launches import MODEL

# What a fit finds up to the signs of eigenvectors.
FITS = {
    "kqsvd": ({"allocate": "greedy"}, ("spectrum_k", "spectrum_v", "loss_k", "loss_v")),
    "eigen": ({}, ("spectrum_k", "spectrum_v")),
    "ksvd": ({}, ("spectrum_k", "spectrum_v")),
    "xkv_aware": ({"allocate": "energy"}, ("root_k", "inverse_k", "loss_k", "loss_v")),
    "xkv": ({"allocate": "greedy", "group_size": 2}, ("loss_k", "loss_v")),
    "kvquant": ({}, ("key_low", "key_high")),
}


@pytest.mark.parametrize("name", FITS)
def test_a_fit_on_two_devices(name):
    options, known = FITS[name]
    method, model = kvgauge.build_method(name, **options), kvgauge.load_model(MODEL)[0]
    expected = fit_on_random_tokens(method, model)
    with SimulatedMachine():
        found = fit_on_random_tokens(method, on_devices(model, ["cuda:0", "cuda:1"]))
    assert found.metadata["model"] == expected.metadata["model"]
    for part in known:
        assert found.tensors[part].device.type == "cpu"
        assert relative_error(found.tensors[part].double(), expected.tensors[part].double()) < 1e-5
