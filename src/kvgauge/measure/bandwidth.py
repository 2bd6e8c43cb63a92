"""How close a decode step comes to the memory's bandwidth.

Decoding one token reads every weight and every cached byte once and computes next to nothing with them: the time of a
step is bounded from below by the bytes moved over the bandwidth. The share of the bandwidth that a step reaches is its
model-bandwidth utilisation.
"""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedModel

from kvgauge.models.identity import weights_nbytes

COPY_NBYTES = 128 * 2**20  # well beyond any last-level cache


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on `device`; on a CPU there is none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device, nbytes: int = COPY_NBYTES, repeats: int = 5) -> float:
    """Bytes per second, read and written, of copying one large tensor: the best of `repeats`.

    The best and not the median: other load can only slow a copy down.

    Args:
        device: whose memory is measured.
        nbytes: size of the tensor.
        repeats: copies after one that is not timed.
    """
    source = torch.ones(max(1, nbytes // 4), dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * source.numel() * source.element_size() / min(times[1:])


def weight_nbytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that one decode step reads: all but an input embedding that is not the output's too."""
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = output is not None and output.weight is embedding
    total = weights_nbytes(model)
    return total if tied else total - embedding.numel() * embedding.element_size()


def utilisation(nbytes: int, seconds: float, bandwidth: float) -> float:
    """Model-bandwidth utilisation: the share of `bandwidth` (bytes/s) that moving `nbytes` in `seconds` reaches."""
    return nbytes / seconds / bandwidth
