"""Memory: estimates, refusals, and peaks of real processes."""

from __future__ import annotations

import pytest
import torch

import kvgauge
from kvgauge import configuration
from kvgauge.architecture.facts import model_facts
from kvgauge.measure.memory import (
    available_nbytes,
    peak_of,
    point_nbytes,
    refuse_beyond,
    reset_peak,
    resident_nbytes,
)


def test_an_estimate_covers_the_uncompressed_cache_and_grows_with_the_grid(tiny) -> None:
    facts = model_facts(tiny("tiny/llama"))
    one, more, longer = (point_nbytes(facts, 128, *point, 8) for point in ((1, 256), (4, 256), (1, 8192)))
    assert one > facts.full_nbytes(256 + 8)
    assert more > one
    assert longer > facts.full_nbytes(8192 + 8)
    assert point_nbytes(facts, 128, 1, 8192, 8, prefill_chunk=512) < longer


def test_what_does_not_fit_is_refused_with_the_estimate() -> None:
    with pytest.raises(kvgauge.UserError) as refusal:
        refuse_beyond({"batch 1 at 10 tokens": 5, "batch 8 at 10 tokens": 40 * 10**9}, limit=2 * 10**9)
    text = str(refusal.value)
    assert "\n" not in text
    for part in ("1 of 2", "batch 8 at 10 tokens", "40.0 GB", "2.0 GB", "latency.context_lengths"):
        assert part in text
    refuse_beyond({"batch 1 at 10 tokens": 5}, limit=2 * 10**9)


def test_the_peak_of_this_process_sees_an_allocation() -> None:
    size = 64 * 2**20
    reset_peak()
    before = resident_nbytes()
    block = torch.ones(size // 4)
    del block
    assert resident_nbytes("VmHWM") >= before + size * 0.9
    assert available_nbytes(torch.device("cpu")) > 0


def job(**changes: object) -> dict[str, object]:
    fields = {"name": "default", "decode_steps": 2, "warmup": 0, "repeats": 1}
    return {
        "model": configuration.read("model", "tiny/llama"),
        "cell": "full",
        "method": None,
        "projections": None,
        "latency": fields,
        "batch": 1,
        "context_length": 64,
    } | changes


def test_a_process_of_its_own_reports_its_peak() -> None:
    peak = peak_of(job())
    assert peak.peak_bytes >= peak.before_bytes > 0


def test_a_process_that_fails_ends_in_one_line() -> None:
    method = configuration.read("method", "kqsvd")
    with pytest.raises(kvgauge.UserError, match="peak memory ended with code") as refusal:
        peak_of(job(cell="kqsvd@0.5", projections="/nowhere/projections.safetensors", method=method))
    assert "/nowhere/projections.safetensors" in str(refusal.value)
