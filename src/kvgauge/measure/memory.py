"""Memory: what a run will take, and what a process took at its peak."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from kvgauge.architecture.facts import ModelFacts
from kvgauge.attend.blocks import SCORE_BLOCK_BYTES
from kvgauge.errors import UserError
from kvgauge.evaluation.decoding import PREFILL_CHUNK

GB = 1e9


def point_nbytes(
    facts: ModelFacts,
    intermediate_size: int,
    batch: int,
    context_length: int,
    decode_steps: int,
    prefill_chunk: int = PREFILL_CHUNK,
) -> int:
    """The memory that one point of a latency grid takes beyond the weights: an estimate from above.

    The caches of a point live one after another, so the largest counts: the uncompressed one, with either one more
    layer (a cache that concatenates holds the old and the new one) or the compressed copy beside it, taken as no
    larger than the exact one. The activations of a prefill chunk come on top.

    Args:
        facts: of the model.
        intermediate_size: of the feed-forward blocks.
        batch: sequences.
        context_length: cached tokens per sequence.
        decode_steps: tokens decoded after them.
        prefill_chunk: tokens of one forward pass before them.
    """
    cache = batch * facts.full_nbytes(context_length + decode_steps)
    chunk = batch * min(context_length, prefill_chunk)
    activations = chunk * (8 * facts.hidden_size + 3 * intermediate_size) * facts.dtype.itemsize
    return cache + cache // facts.num_layers * 2 + cache // 2 + activations + 4 * SCORE_BLOCK_BYTES


def available_nbytes(device: torch.device) -> int:
    """Bytes that can be allocated now on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def refuse_beyond(needed: Mapping[str, int], limit: int) -> None:
    """Refuse work whose estimate exceeds the memory, before it starts.

    Args:
        needed: estimated bytes of every piece of work, by a name for it.
        limit: bytes that may be taken.

    Raises:
        UserError: one exceeds `limit`; the message names the largest with its estimate.
    """
    worst = max(needed, key=lambda name: needed[name])
    if needed[worst] > limit:
        over = sum(size > limit for size in needed.values())
        raise UserError(
            f"{over} of {len(needed)} latency points do not fit in memory: {worst} needs about "
            f"{needed[worst] / GB:.1f} GB and {limit / GB:.1f} GB are free: lower latency.context_lengths or "
            f"latency.batch_sizes"
        )


def resident_nbytes(field: str = "VmRSS") -> int:
    """Bytes of this process in memory now (``VmRSS``) or at its peak (``VmHWM``), from ``/proc/self/status``."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Start counting the peak of this process again, from what is resident now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


@dataclass(frozen=True)
class Peak:
    """The memory of one process.

    Attributes:
        peak_bytes: most bytes resident at once during prefill, compression and decoding, weights included.
        before_bytes: bytes resident before them: interpreter, libraries and weights.
    """

    peak_bytes: int
    before_bytes: int


def peak_of(job: Mapping[str, Any]) -> Peak:
    """Run one cell in a process of its own and return its peak memory.

    The C library is told to give freed tensors back at once: what its heap would keep depends on the order in which
    tensors come and go, and would hide what a cache takes.

    Args:
        job: what `kvgauge.measure.latency.run_alone` takes, as JSON.

    Raises:
        UserError: the process ended with an error.
    """
    result = subprocess.run(
        [sys.executable, "-m", "kvgauge.measure.latency"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the process that measures peak memory ended with code {result.returncode}: {reason}")
    return Peak(**json.loads(result.stdout.strip().splitlines()[-1]))
