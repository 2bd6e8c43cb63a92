"""What a run will take, before it runs: cells, what is stored already, time and memory.

The time comes from a short probe of the model on this machine, scaled by arithmetic (prefill) and by bytes read
(decoding), with answers of full length: it is meant to tell minutes from hours.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from kvgauge.architecture.facts import ModelFacts, model_facts
from kvgauge.attend.blocks import SCORE_BLOCK_BYTES
from kvgauge.contract.budget import reference_nbytes
from kvgauge.evaluation.cell import Cell
from kvgauge.evaluation.decoding import PREFILL_CHUNK, greedy, prefill
from kvgauge.evaluation.engine import missing
from kvgauge.evaluation.store import AnswerStore
from kvgauge.evaluation.units import Encoder, Unit
from kvgauge.methods.exact.full import Full
from kvgauge.models.identity import weights_nbytes

PROBE_TOKENS = 512
PROBE_STEPS = 8


@dataclass(frozen=True)
class CellState:
    """How far a cell is: answers that are stored, and all answers."""

    cell: Cell
    stored: int
    total: int


@dataclass(frozen=True)
class Estimate:
    """Seconds by phase, and bytes at the peak, of one process.

    Attributes:
        prefill, decode: seconds.
        weights, exact, compressed, activations: bytes of the model, of the largest exact context, of its largest
            compressed cache, and of one forward pass.
    """

    prefill: float
    decode: float
    weights: int
    exact: int
    compressed: int
    activations: int

    @property
    def seconds(self) -> float:
        return self.prefill + self.decode

    @property
    def nbytes(self) -> int:
        return self.weights + self.exact + self.compressed + self.activations


@dataclass(frozen=True)
class Speed:
    """A model's speed on this machine.

    Attributes:
        flops: arithmetic operations a second while prefilling.
        bandwidth: bytes of weights and cache read a second while decoding.
    """

    flops: float
    bandwidth: float


def states(units: Sequence[Unit], cells: Sequence[Cell], store: AnswerStore) -> list[CellState]:
    """How far every cell is."""
    keys = [key for unit in units for key in unit.keys]
    return [
        CellState(cell, sum(store.get(cell.fingerprint, key) is not None for key in keys), len(keys)) for cell in cells
    ]


def probe(model: PreTrainedModel) -> Speed:
    """Measure the speed of a model with a short prefill and a few steps."""
    facts = model_facts(model)
    tokens = min(PROBE_TOKENS, facts.max_positions - PROBE_STEPS - 1)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(tokens, device=model.device)[None] % vocabulary
    prefill(model, ids[:, :16], Full().new_cache(model))  # the first pass of a process is slower than all others
    cache = Full().new_cache(model)
    start = time.perf_counter()
    logits = prefill(model, ids, cache)
    float(logits.sum())  # waits for the device
    middle = time.perf_counter()
    greedy(model, logits, cache, PROBE_STEPS + 1, ())
    end = time.perf_counter()
    read = PROBE_STEPS * (weights_nbytes(model) + facts.full_nbytes(tokens))
    return Speed(_prefill_flops(model, tokens) / (middle - start), read / (end - middle))


def estimate(
    model: PreTrainedModel,
    encoder: Encoder,
    units: Sequence[Unit],
    cells: Sequence[Cell],
    store: AnswerStore,
    speed: Speed,
    processes: int = 1,
) -> Estimate:
    """What is left to do.

    Args:
        model: loaded.
        encoder: makes the units' token ids.
        units, cells, store: of the run.
        speed: from `probe`.
        processes: that share the time.
    """
    facts, weights = model_facts(model), weights_nbytes(model)
    prefill_s = decode_s = 0.0
    widest = 0
    for unit in units:
        waiting = missing(unit, cells, store)
        if not waiting:
            continue
        batch, _ = encoder.batch(unit)
        width = batch.width("prompt")
        widest = max(widest, width * batch.size)
        prefills = any(cell.method.needs.exact_prefill for cell in waiting) + sum(
            not cell.method.needs.exact_prefill for cell in waiting
        )
        prefill_s += prefills * batch.size * _prefill_flops(model, width) / speed.flops
        steps = sum(max(limits) for limits in batch.max_new_tokens)
        for cell in waiting:
            cached = _cached_nbytes(facts, cell, width * batch.size)
            decode_s += steps * (weights + cached) / speed.bandwidth
    config = model.config.get_text_config()
    rows = min(PREFILL_CHUNK, widest)
    activations = rows * (4 * config.hidden_size + 3 * config.intermediate_size) * facts.dtype.itemsize
    return Estimate(
        prefill=prefill_s / processes,
        decode=decode_s / processes,
        weights=weights,
        exact=facts.full_nbytes(widest),
        compressed=max(_cached_nbytes(facts, cell, widest) for cell in cells),
        activations=activations + min(SCORE_BLOCK_BYTES, rows * widest * facts.num_attention_heads * 4),
    )


def describe(known: Sequence[CellState], left: Estimate | None) -> str:
    """The dry run as text: a line per cell, then time and memory."""
    width = max(len("cell"), *(len(state.cell.label) for state in known))
    lines = [f"{'cell':<{width}}  compress_at  stored  to do  fingerprint"]
    lines += [
        f"{state.cell.label:<{width}}  {state.cell.compress_at:<11}  {state.stored:>6}  "
        f"{state.total - state.stored:>5}  {state.cell.fingerprint}"
        for state in known
    ]
    if left is None:
        return "\n".join([*lines, "nothing is left to compute"])
    lines.append(
        f"time: about {_duration(left.seconds)} at most (prefill {_duration(left.prefill)}, "
        f"decoding {_duration(left.decode)})"
    )
    lines.append(
        f"memory: about {_size(left.nbytes)} (weights {_size(left.weights)}, exact context {_size(left.exact)}, "
        f"compressed cache {_size(left.compressed)}, one forward pass {_size(left.activations)})"
    )
    return "\n".join(lines)


def _cached_nbytes(facts: ModelFacts, cell: Cell, tokens: int) -> int:
    return int(reference_nbytes(cell.method, facts, tokens) * (cell.budget or 1.0))


def _prefill_flops(model: PreTrainedModel, tokens: int) -> float:
    """Two operations per weight and token, and causal attention: 2 · H · d · tokens² per layer."""
    facts = model_facts(model)
    embedding = model.get_input_embeddings().weight.numel()
    weights = sum(parameter.numel() for parameter in model.parameters()) - embedding
    attention = 2.0 * facts.num_layers * facts.num_attention_heads * facts.head_dim * tokens**2
    return 2.0 * weights * tokens + attention


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
