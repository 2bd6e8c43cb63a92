"""One method on devices: the answers, the bytes, and what a decode step costs there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.contract.fitted import Fitted
from kvgauge.contract.method import Method
from kvgauge.evaluation.decoding import padding_arguments, prefill
from kvgauge.layers.cache import KVCache
from kvgauge.measure.random_prompts import random_tokens
from kvgauge.simulation.machine import SimulatedMachine
from kvgauge.simulation.placing import on_devices
from kvgauge.simulation.tally import Tally
from kvgauge.simulation.tensor import SimulatedTensor, simulated

CONTEXT, CHUNK, QUESTION, STEPS, PADDING = 200, 128, 5, 3, 17


@dataclass(frozen=True)
class Run:
    """What came of a padded or plain batch of two: context in chunks, compression, question, decode steps.

    Attributes:
        logits: (batch, 1 + steps, vocabulary), after the question and after every step.
        nbytes: of the cache, after the compression and at the end; without tables that are made when they are needed.
        prefill, compress, question, step: work of each stage, of the last decode step; None on the CPU.
    """

    logits: Tensor
    nbytes: tuple[int, int]
    prefill: Tally | None = None
    compress: Tally | None = None
    question: Tally | None = None
    step: Tally | None = None


def run_on_cpu(method: Method, model: PreTrainedModel, fitted: Fitted | None, *, padded: bool) -> Run:
    """The same without devices."""
    return _run(method, model, fitted, *_batch(padded), machine=None)


def run_on_devices(
    method: Method, model: PreTrainedModel, fitted: Fitted | None, devices: Sequence[str], *, padded: bool
) -> Run:
    """A method on simulated devices.

    Args:
        method: any.
        model: on the CPU; a copy is spread over the devices.
        fitted: what the method learned on it.
        devices: e.g. ``["cuda:0", "cuda:1"]``.
        padded: the second sequence is shorter than the first.

    Raises:
        MixedDevicesError: tensors of two devices met.
        UserError: the method refuses the batch.
    """
    ids, mask = _batch(padded)
    with SimulatedMachine() as machine:
        placed = on_devices(model, devices)
        inputs = simulated(ids, devices[0]), None if mask is None else simulated(mask, devices[0])
        return _run(method, placed, fitted, *inputs, machine=machine)


def _batch(padded: bool) -> tuple[Tensor, Tensor | None]:
    ids = random_tokens(2, CONTEXT + QUESTION + STEPS, seed=5)
    if not padded:
        return ids, None
    mask = torch.ones(ids.shape, dtype=torch.bool)
    mask[1, :PADDING] = False
    return ids, mask


@torch.no_grad()
def _run(
    method: Method,
    model: PreTrainedModel,
    fitted: Fitted | None,
    ids: Tensor,
    mask: Tensor | None,
    *,
    machine: SimulatedMachine | None,
) -> Run:
    tallies: list[Tally | None] = []

    def stage_done() -> None:
        tallies.append(None if machine is None else machine.restart())

    cache = method.new_cache(model, fitted)
    stage_done()
    prefill(model, ids[:, :CONTEXT], cache, CHUNK, None if mask is None else mask[:, :CONTEXT])
    stage_done()
    cache.compress()
    stage_done()
    size = _held(cache)
    asked = CONTEXT + QUESTION
    logits = [prefill(model, ids[:, CONTEXT:asked], cache, CHUNK, None if mask is None else mask[:, :asked])]
    stage_done()
    for total in range(asked + 1, asked + STEPS + 1):
        extra = padding_arguments(mask, total, 1)
        if machine is not None:
            machine.restart()
        step = ids[:, total - 1 : total]
        logits.append(model(input_ids=step, past_key_values=cache, use_cache=True, **extra).logits[:, -1])
    stage_done()
    answers = torch.stack(logits, dim=1)
    plain = answers.numbers if isinstance(answers, SimulatedTensor) else answers
    return Run(plain, (size, _held(cache)), *tallies[1:])


def _held(cache: KVCache) -> int:
    return sum(size for part, size in cache.nbytes_by_part().items() if part != "angles")
