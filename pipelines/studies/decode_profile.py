"""Where the time of a decode step goes: linear layers, attention's products, softmax, copies, and everything else.

    python -m pipelines.studies.decode_profile --methods full kqsvd --budget 0.5 --batch 8 --tokens 8192 \\
        --projections kqsvd=artifacts/fit/…/projections.safetensors

Every cell's cache is filled with random keys and values and compressed; `torch.profiler` then sums the time inside each
operator over a few steps. ``--plain-linear`` takes torch's own linear layers instead of
`kvgauge.models.narrow_linear`, ``KVGAUGE_NATIVE=0`` before the command does without compiled kernels, and ``--compile``
captures the whole step as one graph with `torch.compile` (minutes of compiling per cell on a CPU). The last line is one
JSON object: seconds of a step, by part.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Cache, PreTrainedModel

from kvgauge.architecture.facts import model_facts
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.fitting import learns
from kvgauge.errors import UserError
from kvgauge.layers.cache import KVCache
from kvgauge.measure.latency import baselines, contender
from kvgauge.measure.synthetic import fill, random_states
from kvgauge.methods.registry import build_method
from kvgauge.models import narrow_linear
from kvgauge.models.loading import load_model
from kvgauge.stage import fail

PARTS = {
    "linear": ("aten::mm", "aten::addmm", "kvgauge::narrow_product"),
    "attention products": (
        "aten::bmm",
        "aten::baddbmm",
        "kvgauge::decode_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_flash_attention",
    ),
    "softmax": ("aten::_softmax",),
    "copies": ("aten::copy_", "aten::cat", "aten::_copy_from", "aten::clone"),
}
OTHERS = "other operators"
OUTSIDE = "between operators"

WARMUP = 2  # steps


def part_of(operator: str) -> str:
    return next((part for part, names in PARTS.items() if operator in names), OTHERS)


@torch.no_grad()
def step_profile(step: Callable[[], object], steps: int) -> dict[str, float]:
    """Seconds of a step (median, without the profiler) and of its parts, `PARTS`, `OTHERS` and `OUTSIDE`.

    The profiler slows what it watches, small operators most: the parts are its shares of the time that it saw, times
    the step that was timed without it. What no operator claims is Python and dispatch, ``between operators``.
    """
    seconds = []
    for index in range(WARMUP + steps):
        start = time.perf_counter()
        step()
        if index >= WARMUP:
            seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        for _ in range(steps):
            step()
    total = time.perf_counter() - start
    spent: dict[str, float] = defaultdict(float)
    for event in watched.key_averages():
        spent[part_of(event.key)] += event.self_cpu_time_total / 1e6
    spent[OUTSIDE] = max(0.0, total - sum(spent.values()))
    whole, seen = statistics.median(seconds), sum(spent.values())
    return {"step": whole} | {part: whole * spent[part] / seen for part in (*PARTS, OTHERS, OUTSIDE)}


@torch.no_grad()
def filled(
    model: PreTrainedModel, new_cache: Callable[[int], Cache], states: tuple[Tensor, Tensor], steps: int
) -> Cache:
    """A cache that holds `states`, keys and values as `random_states`, in every layer, compressed."""
    tokens = states[0].shape[2]
    cache = new_cache(tokens + steps)
    if isinstance(cache, KVCache):
        cache.expect(tokens)
    fill(model, cache, *states)
    if isinstance(cache, KVCache):
        cache.compress()
    return cache


def measure(model: PreTrainedModel, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """`step_profile` of every method of the command line.

    Raises:
        UserError: an unknown method, a budget out of range, or a method that learns without its projections.
    """
    fits = dict(given.split("=", 1) for given in options.projections)
    plain = {one.cell: one for one in baselines(model)}
    cells = []
    for name in options.methods:
        if name not in plain:
            method = build_method(name, budget=options.budget)
            if learns(method) and name not in fits:
                raise UserError(f"{name} learns projections: add --projections {name}=FILE, a file of the fit stage")
            cells.append(contender(model, method, Fitted.load(Path(fits[name])) if learns(method) else None))
        else:
            cells.append(plain[name])
    generator = torch.Generator().manual_seed(0)
    states = random_states(model_facts(model), options.batch, options.tokens, generator, model.device)
    token = torch.zeros(options.batch, 1, dtype=torch.long, device=model.device)
    forward = torch.compile(model.forward, fullgraph=True, dynamic=True) if options.compile else model
    seconds = {}
    for cell in cells:
        cache = filled(model, cell.new_cache, states, 2 * options.steps + WARMUP)
        seconds[cell.cell] = step_profile(
            partial(forward, input_ids=token, past_key_values=cache, use_cache=True), options.steps
        )
        del cache
        gc.collect()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Where the time of a decode step goes.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default=None, help="of the model; its own as a rule")
    parser.add_argument("--methods", nargs="+", default=["dynamic", "full"])
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--projections", nargs="*", default=[], help="method=projections.safetensors")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--plain-linear", action="store_true")
    parser.add_argument("--compile", action="store_true", help="capture the step with torch.compile")
    options = parser.parse_args()
    try:
        model, _ = load_model(options.model, dtype=options.dtype)
        if options.plain_linear:
            narrow_linear.remove(model)
        seconds = measure(model, options)
    except UserError as error:
        fail(str(error))
    print(json.dumps({**vars(options), "threads": torch.get_num_threads(), "seconds": seconds}))


if __name__ == "__main__":
    main()
