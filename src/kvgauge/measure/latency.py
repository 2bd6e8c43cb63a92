"""Latency of prefill and decoding, in rounds that interleave what is compared.

A point is a batch size and a context length. A round fills a cache per contender, one after another, compresses it,
and times decode steps; the order rotates from round to round. All ratios are medians over rounds of ratios within a
round, so that a slow moment of the machine weighs on both sides. Uncompressed caches are always there: transformers'
DynamicCache, which copies the whole cache at every token, a preallocated one, which does not, both with torch's own
attention, and where compressed caches decode with a compiled kernel, a preallocated one that does so too.

Run as a module, it measures the peak memory of one cell (see `kvgauge.measure.memory.peak_of`).
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvgauge import configuration
from kvgauge.architecture.facts import check_length, model_facts
from kvgauge.architecture.kinds import own_cache
from kvgauge.architecture.prompt_length import prompt_length
from kvgauge.architecture.rotations import layer_rotations
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.identity import config as config_of
from kvgauge.contract.method import Method
from kvgauge.contract.while_decoding import cell_label, new_cache
from kvgauge.errors import UserError, unknown
from kvgauge.evaluation.decoding import PREFILL_CHUNK, prefill
from kvgauge.kernels.cpu.decode_attention import applies
from kvgauge.layers import others
from kvgauge.layers.cache import KVCache
from kvgauge.measure.bandwidth import copy_bandwidth, synchronize, utilisation, weight_nbytes
from kvgauge.measure.memory import reset_peak, resident_nbytes
from kvgauge.measure.synthetic import fill, random_query, random_states
from kvgauge.methods.registry import build_method
from kvgauge.models.identity import weights_nbytes
from kvgauge.models.loading import load_model

PREFILLS = ("real", "synthetic")
DYNAMIC, STATIC, ONE_PASS = "dynamic", "full", "full-one-pass"
UNCOMPRESSED = (DYNAMIC, STATIC, ONE_PASS)

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """The grid and how to time it.

    Attributes:
        name: of the grid.
        cells: ``{method: name, field: value, ...}`` each; None measures the cells of the
            run: its panel, or its method at its budgets.
        context_lengths: tokens cached before decoding starts; may exceed the model's positions, for timing only.
        batch_sizes: sequences decoded together.
        decode_steps: timed steps of a round.
        warmup: untimed steps before them.
        repeats: rounds.
        prefill: ``real`` runs the model over random tokens; ``synthetic`` fills the caches with random keys and
            values, for contexts whose prefill would take too long: there is no time to first token then.
        prefill_chunk: tokens of one forward pass of a real prefill. Peak memory has the activations of one chunk and,
            with ``compress_prefill``, its exact keys and values.
        peak: measure each cell's peak memory in a process of its own.
        memory_limit: bytes that a point may take; None takes what is free.
        seed: of the random tokens.

    Raises:
        UserError: an empty grid, or a number out of range.
    """

    name: str = "default"
    cells: Sequence[Mapping[str, Any]] | None = None
    context_lengths: Sequence[int] = (1024,)
    batch_sizes: Sequence[int] = (1,)
    decode_steps: int = 16
    warmup: int = 2
    repeats: int = 3
    prefill: str = "real"
    prefill_chunk: int = PREFILL_CHUNK
    peak: bool = False
    memory_limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prefill not in PREFILLS:
            raise unknown("latency.prefill", self.prefill, PREFILLS)
        for name in ("context_lengths", "batch_sizes"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise UserError(f"latency.{name} needs at least one number, each 1 or more")
        for name, least in (("decode_steps", 1), ("warmup", 0), ("repeats", 1), ("prefill_chunk", 1)):
            if getattr(self, name) < least:
                raise UserError(f"latency.{name} is {getattr(self, name)}: set it to {least} or more")
        for cell in self.cells or ():
            if "method" not in cell:
                raise UserError("each of latency.cells names its method, e.g. {method: kqsvd, budget: 0.5}")

    @property
    def points(self) -> list[tuple[int, int]]:
        """(batch, context length) of the whole grid, smallest first."""
        pairs = {(int(batch), int(length)) for batch in self.batch_sizes for length in self.context_lengths}
        return sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair))

    @property
    def all_steps(self) -> int:
        """Decode steps of a round, timed or not."""
        return self.warmup + self.decode_steps

    def methods(self, configured: Sequence[Method]) -> list[Method]:
        """The methods of the cells, or `configured`; each once, and the uncompressed cache is not among them.

        Raises:
            UserError: an unknown method, a refused field, or two different cells of the same label.
        """
        if self.cells is None:
            methods = list(configured)
        else:
            methods = [
                build_method(cell["method"], **{name: value for name, value in cell.items() if name != "method"})
                for cell in self.cells
            ]
        # a panel may have a method at two moments of compression: it is timed once
        methods = list({configuration.digest(config_of(method)): method for method in methods}.values())
        labels = [cell_label(method) for method in methods]
        for label in labels:
            if labels.count(label) > 1:
                raise UserError(f"two different cells are called {label}: give one of them another name")
        return [method for method in methods if method.label != STATIC]


@dataclass(frozen=True)
class Contender:
    """A kind of cache to be timed.

    Attributes:
        cell: label of the rows.
        method, budget: of the rows.
        new_cache: an empty cache, given the tokens it will hold in all.
        compresses: ``compress`` is part of its time to first token.
    """

    cell: str
    method: str
    budget: float | None
    new_cache: Callable[[int], Cache]
    compresses: bool


def contender(model: PreTrainedModel, method: Method, fitted: Fitted | None) -> Contender:
    """The caches of a method."""
    return Contender(
        cell_label(method),
        method.name,
        method.budget,
        lambda tokens: new_cache(method, model, fitted),
        compresses=True,
    )


def baselines(model: PreTrainedModel) -> list[Contender]:
    """The uncompressed caches: concatenating, preallocated, and one for the compiled kernel where there is one."""
    facts = model_facts(model)
    # in the layout that the kernel reads: the tokens of a dimension side by side
    states = torch.empty(1, 1, facts.head_dim, 1, dtype=model.dtype, device=model.device).mT
    compiled = facts.latent is None and applies(states.expand(1, 1, facts.num_key_value_groups, -1), states, states)
    return [
        Contender(DYNAMIC, "dynamic", None, lambda tokens: own_cache(model.config), compresses=False),
        uncompressed(model),
        *([uncompressed(model, one_pass=True)] if compiled else []),
    ]


def uncompressed(model: PreTrainedModel, *, one_pass: bool = False) -> Contender:
    """The preallocated uncompressed cache, with torch's attention or the compiled kernel."""
    return Contender(
        ONE_PASS if one_pass else STATIC,
        "full",
        None,
        lambda tokens: build_method("full", reserve=tokens, one_pass=one_pass).new_cache(model),
        compresses=one_pass,  # the kernel's layout is made after the prefill
    )


@dataclass
class Timings:
    """What one contender showed, a list entry a round.

    Attributes:
        prefill, compress: seconds.
        steps: seconds of every timed decode step of a round.
        attention: seconds that attention to the cache takes in a decode step, all layers that may be compressed.
        nbytes, fixed_nbytes: cached bytes right after compression, and bytes of projections.
        read_nbytes: cached bytes that a step in the middle of the decode steps reads.
        others_nbytes: those of them that are in windows and states, which are left to transformers.
    """

    prefill: list[float] = field(default_factory=list)
    compress: list[float] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)
    nbytes: int = 0
    fixed_nbytes: int = 0
    read_nbytes: int = 0
    others_nbytes: int = 0

    def firsts(self) -> list[float]:
        """Seconds to the first token, a round each: prefill and compression; empty where the prefill was synthetic."""
        if not self.prefill:
            return []
        return [first + second for first, second in zip(self.prefill, self.compress, strict=True)]

    def tpot(self, index: int) -> float:
        """Median seconds of a decode step in one round."""
        return statistics.median(self.steps[index])


@torch.no_grad()
def measure_point(
    model: PreTrainedModel,
    contenders: Sequence[Contender],
    config: LatencyConfig,
    batch: int,
    context_length: int,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Time every contender at one point of the grid.

    Args:
        model: loaded by `kvgauge.load_model`.
        contenders: `baselines` first, then the cells.
        config: how to time.
        batch: sequences.
        context_length: cached tokens per sequence.
        progress: called with a line before every timing.

    Returns:
        One row per contender. Seconds: ``ttft_s`` (prefill and compression), ``prefill_s``, ``compress_s``,
        ``tpot_median_s``, ``tpot_p95_s``, ``attention_s``. Bytes of all sequences: ``nbytes``, ``fixed_nbytes``; of the
        model: ``weights_nbytes``.
        ``bandwidth`` is the copy bandwidth (bytes/s) of this point, ``mbu`` the share of it that a decode step
        reaches (weights once, a basis once a layer), ``attention_of_bound`` the bound of reading the cache over
        ``attention_s``. Ratios: ``tpot_over_static``, ``tpot_over_dynamic``, ``tpot_over_one_pass`` (to the
        uncompressed cache with the compiled kernel, None where there is none), ``ttft_over_static``.

    Raises:
        UserError: ``prefill: synthetic`` with a method, or a model, that needs more of a prefill than keys and values,
            or a context beyond the positions of a model that has a table of them.
    """
    with prompt_length(model, context_length + config.all_steps):
        return _measured_point(model, contenders, config, batch, context_length, progress)


def _measured_point(
    model: PreTrainedModel,
    contenders: Sequence[Contender],
    config: LatencyConfig,
    batch: int,
    context_length: int,
    progress: Callable[[str], None],
) -> list[Row]:
    for one in contenders if config.prefill == "synthetic" else ():
        cache = one.new_cache(context_length + config.all_steps)
        if isinstance(cache, KVCache) and not cache.fillable:
            raise UserError(f"{one.cell} needs more of a prefill than keys and values: use latency.prefill=real")
    facts = model_facts(model)
    if config.prefill == "synthetic" and facts.others_nbytes(context_length):
        raise UserError(f"{facts.name} has windows or states, which no random keys fill: use latency.prefill=real")
    if any(isinstance(rotation, str) for rotation in layer_rotations(model)):
        check_length(model, context_length + config.all_steps, "a context with its decode steps")
    generator = torch.Generator().manual_seed(config.seed)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (batch, context_length), generator=generator).to(model.device)
    source = None
    if config.prefill == "synthetic":
        source = random_states(facts, batch, context_length, generator, model.device)
    prefill(model, ids[:, :16], own_cache(model.config))  # threads and lazily made tables
    timings = [Timings() for _ in contenders]
    bandwidths = []
    for index in range(config.repeats):
        bandwidths.append(copy_bandwidth(model.device))
        for turn in range(len(contenders)):
            chosen = (turn + index) % len(contenders)
            progress(f"batch {batch}, {context_length} tokens, round {index + 1}, {contenders[chosen].cell}")
            _time_once(model, contenders[chosen], config, ids, source, timings[chosen])
    bandwidth = max(bandwidths)
    uncompressed_timings = {
        one.cell: times for one, times in zip(contenders, timings, strict=True) if one.cell in UNCOMPRESSED
    }
    return [
        _row(model, one, times, uncompressed_timings, bandwidth, batch, context_length)
        for one, times in zip(contenders, timings, strict=True)
    ]


def _time_once(
    model: PreTrainedModel,
    one: Contender,
    config: LatencyConfig,
    ids: Tensor,
    source: tuple[Tensor, Tensor] | None,
    times: Timings,
) -> None:
    batch, tokens = ids.shape
    cache = one.new_cache(tokens + config.all_steps)
    if isinstance(cache, KVCache):
        cache.expect(tokens)
    start = _now(model)
    if source is None:
        logits = prefill(model, ids, cache, config.prefill_chunk, beyond_positions=True)
        token = logits.argmax(dim=-1, keepdim=True)
        times.prefill.append(_now(model) - start)
    else:
        fill(model, cache, *source)
        token = ids[:, -1:]
    start = _now(model)
    if one.compresses and isinstance(cache, KVCache):
        cache.compress()
    times.compress.append(_now(model) - start if one.compresses else 0.0)
    times.nbytes = cache_nbytes(cache)
    times.fixed_nbytes = cache.fixed_nbytes() if isinstance(cache, KVCache) else 0
    steps = []
    for index in range(config.all_steps):
        start = _now(model)
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(dim=-1, keepdim=True)
        seconds = _now(model) - start
        if index >= config.warmup:
            steps.append(seconds)
        if index == config.warmup + config.decode_steps // 2:
            times.read_nbytes = cache.read_nbytes() if isinstance(cache, KVCache) else cache_nbytes(cache)
            times.others_nbytes = sum(map(others.nbytes, cache.others())) if isinstance(cache, KVCache) else 0
    times.steps.append(steps)
    if isinstance(cache, KVCache):
        times.attention.append(attention_seconds(model, cache, batch))
    del cache
    gc.collect()


def _now(model: PreTrainedModel) -> float:
    synchronize(model.device)
    return time.perf_counter()


def cache_nbytes(cache: Cache) -> int:
    """Live bytes of all sequences, of our caches and of transformers' own."""
    if isinstance(cache, KVCache):
        return cache.nbytes()
    return sum(map(others.nbytes, cache.layers))


def attention_seconds(model: PreTrainedModel, cache: KVCache, batch: int, repeats: int = 5) -> float:
    """Seconds that one decode step spends on attention to the cache, all layers: the median of `repeats` passes.

    Every pass goes through all layers, so that none finds its cache in a processor's cache where the model would not.
    """
    query, scaling = random_query(model_facts(model), batch, model.device)
    times = []
    for _ in range(repeats + 1):
        start = _now(model)
        for layer in cache.own:
            layer.attend_entries(query, scaling)
        times.append(_now(model) - start)
    return statistics.median(times[1:])


def _row(
    model: PreTrainedModel,
    one: Contender,
    times: Timings,
    uncompressed: Mapping[str, Timings],
    bandwidth: float,
    batch: int,
    context_length: int,
) -> Row:
    static = uncompressed[STATIC]
    rounds = range(len(times.steps))
    steps = [seconds for steps in times.steps for seconds in steps]
    median = statistics.median(steps)
    firsts = times.firsts()
    read = times.read_nbytes + times.fixed_nbytes
    attended = read - times.others_nbytes
    attention = statistics.median(times.attention) if times.attention else None
    return {
        "cell": one.cell,
        "method": one.method,
        "budget": one.budget,
        "batch": batch,
        "context_length": context_length,
        "ttft_s": _median(firsts),
        "prefill_s": _median(times.prefill),
        "compress_s": _median(times.compress),
        "tpot_median_s": median,
        "tpot_p95_s": float(np.quantile(steps, 0.95)),
        "tokens_per_s": batch / median,
        "attention_s": attention,
        "attention_of_bound": None if attention is None else utilisation(attended, attention, bandwidth),
        "nbytes": times.nbytes,
        "fixed_nbytes": times.fixed_nbytes,
        "weights_nbytes": weights_nbytes(model),
        "peak_bytes": None,
        "bandwidth": bandwidth,
        "mbu": utilisation(weight_nbytes(model) + read, median, bandwidth),
        **{
            f"tpot_over_{name}": statistics.median(
                times.tpot(index) / uncompressed[cell].tpot(index) for index in rounds
            )
            if cell in uncompressed
            else None
            for name, cell in (("static", STATIC), ("dynamic", DYNAMIC), ("one_pass", ONE_PASS))
        },
        "ttft_over_static": _median([first / plain for first, plain in zip(firsts, static.firsts(), strict=True)]),
    }


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


# -- peak memory, in a process of its own ----------------------------------------------------------------------------


def run_alone(job: Mapping[str, Any]) -> dict[str, int]:
    """Prefill, compress and decode one cell once, and report this process's memory.

    Args:
        job: ``model`` (a node of ``conf/model``), ``cell`` (its label), ``method`` (a node of ``conf/method``) and
            ``projections`` (a path or None) of cells that are none of `UNCOMPRESSED`, ``latency`` (fields of
            `LatencyConfig`), ``batch``, ``context_length``.
    """
    model, _ = load_model(configuration.build(job["model"], "model"))
    config = LatencyConfig(**job["latency"])
    if job["cell"] in UNCOMPRESSED:
        one = next(plain for plain in baselines(model) if plain.cell == job["cell"])
    else:
        method: Method = configuration.build(job["method"], "method")
        one = contender(model, method, Fitted.load(Path(job["projections"])) if job["projections"] else None)
    generator = torch.Generator().manual_seed(config.seed)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (job["batch"], job["context_length"]), generator=generator).to(model.device)
    prefill(model, ids[:, :16], own_cache(model.config))
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
        _run(model, one, config, ids)
        return {"peak_bytes": torch.cuda.max_memory_allocated(model.device), "before_bytes": before}
    reset_peak()
    before = resident_nbytes()
    _run(model, one, config, ids)
    return {"peak_bytes": resident_nbytes("VmHWM"), "before_bytes": before}


@torch.no_grad()
def _run(model: PreTrainedModel, one: Contender, config: LatencyConfig, ids: Tensor) -> None:
    with prompt_length(model, ids.shape[1] + config.all_steps):
        _time_once(model, one, config, ids, None, Timings())


if __name__ == "__main__":
    print(json.dumps(run_alone(json.load(sys.stdin))))
