"""Compression to packed form, in a process of its own: never the whole cache twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys, torch
import kvgauge
from kvgauge.measure.memory import reset_peak, resident_nbytes
members = json.loads(sys.argv[1])
model, _ = kvgauge.load_model("tiny/llama")
cache = kvgauge.build_method("compose", compose=members, budget=None).new_cache(model)
for layer in cache.own:
    layer.fill(torch.randn(2, 2, 32768, 16), torch.randn(2, 2, 32768, 16))
cache.positions = torch.arange(32768)[None]
exact = cache.nbytes()
reset_peak()
before = resident_nbytes()
cache.compress()
print(json.dumps({"exact": exact, "packed": cache.nbytes(), "more": resident_nbytes("VmHWM") - before}))
"""
CELLS = {
    "int8": ["full", "int8"],
    "kivi2": ["full", "kivi2"],
    "turboquant": ["full", {"method": "turboquant_prod", "bits": 3.5}],
    "one group of four": [{"method": "xkv", "group_size": 1, "rank": 8, "rope": "post", "sinks": 4}, "int8"],
}


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset here")
@pytest.mark.parametrize("name", CELLS)
def test_the_whole_cache_is_never_there_twice(name):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(CELLS[name])],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # the C library gives freed tensors back at once
    )
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["packed"] < 0.35 * found["exact"]
    assert found["more"] < 0.7 * found["exact"], "packing a part at a time takes that part twice, not the whole"
