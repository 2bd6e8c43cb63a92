"""Steps of one shape on devices: nothing to wait for and nothing to upload, which is what a CUDA graph asks."""

from __future__ import annotations

import pytest
import torch

import kvgauge
from kvgauge.evaluation.decoding import prefill
from kvgauge.simulation.machine import SimulatedMachine
from kvgauge.simulation.placing import on_devices
from kvgauge.simulation.tensor import simulated
from kvgauge.testing import random_tokens, relative_error
from tests.devices.launches import MODEL, prepared

CASES = ("full", "kqsvd", "xkv", "xkv post", "minicache", "mean_merge", "kvslimmer and kqsvd")
CONTEXT, STEPS = 160, 3


@pytest.mark.parametrize("devices", [["cuda:0"], ["cuda:0", "cuda:1"]], ids=["one", "two"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_host_neither_waits_nor_uploads(case, devices):
    method, fitted = prepared(case)
    model, ids = kvgauge.load_model(MODEL)[0], random_tokens(2, CONTEXT + STEPS, seed=3)
    expected, cache = [], method.new_cache(model, fitted)
    prefill(model, ids[:, :CONTEXT], cache)
    cache.compress()
    for step in range(CONTEXT, CONTEXT + STEPS):
        expected.append(model(ids[:, step : step + 1], past_key_values=cache).logits)
    with SimulatedMachine() as machine:
        placed, given = on_devices(model, devices), simulated(ids, devices[0])
        cache = method.new_cache(placed, fitted)
        prefill(placed, given[:, :CONTEXT], cache)
        cache.compress()
        cache.fix_shapes(STEPS)
        for step in range(STEPS):
            machine.restart()
            now = CONTEXT + step
            logits = placed(given[:, now : now + 1], past_key_values=cache).logits
            assert relative_error(logits.numbers, expected[step]) < 1e-3
            if step:  # tables of angles are made in the first
                assert not machine.tally.syncs and not machine.tally.uploads
        assert cache.release_shapes() == STEPS
        assert cache.get_seq_length() == CONTEXT + STEPS
