"""What merging costs while the prompt is read: time and peak memory of one prefill, every way beside the others.

    python -m pipelines.studies.merging_cost --model smollm2-135m --tokens 4096 --max-entries 1024

Ways: ``full`` (one uncompressed cache), ``windowed`` (the same windows, nothing merged), ``streaming_llm`` (evicted
instead of merged), ``kvslimmer``, ``two_pass`` (the published way, see `pipelines.studies.two_pass`) and ``asymkv`` (a
backward pass per window). Times are medians of repeats that take turns in one process; peaks are measured in a process
for each way. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvgauge.architecture.facts import check_length, model_facts
from kvgauge.errors import UserError
from kvgauge.evaluation.decoding import PREFILL_CHUNK, prefill
from kvgauge.measure.memory import reset_peak, resident_nbytes
from kvgauge.methods.merging.merging import Streaming
from kvgauge.methods.registry import build_method
from kvgauge.models.loading import load_model

from .two_pass import TwoPassCache, TwoPassLayer

WAYS = ("full", "windowed", "streaming_llm", "kvslimmer", "two_pass", "asymkv")
LONG = ("full", "kvslimmer")


def cache_of(way: str, model: PreTrainedModel, tokens: int, max_entries: int, window: int) -> Cache:
    """An empty cache for one of `WAYS`."""
    if way == "full":
        return build_method("full").new_cache(model)
    name = way if way in ("streaming_llm", "asymkv") else "kvslimmer"
    entries = tokens if way == "windowed" else max_entries
    method = build_method(name, max_entries=entries, window=window)
    assert isinstance(method, Streaming)
    if way != "two_pass":
        return method.new_cache(model)
    policy = method.policy(model_facts(model))
    made = method.new_cache(model)
    return TwoPassCache([TwoPassLayer(policy, layer.rotary) for layer in made.layers])


def prompt(model: PreTrainedModel, tokens: int) -> Tensor:
    """Random token ids (1, tokens): what they say costs nothing."""
    drawn = torch.randint(0, model.config.get_text_config().vocab_size, (1, tokens), generator=torch.manual_seed(0))
    return drawn.to(model.device)


def times(model: PreTrainedModel, options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of a prefill for every way, by the clock and of the processors.

    The ways take turns, so that a slow minute slows all of them; the processors' seconds hardly feel other processes.
    """
    ids = prompt(model, options.tokens)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    of_processors: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(options.repeats + 1):
        for way in WAYS:
            cache = cache_of(way, model, options.tokens, options.max_entries, options.window)
            # the first round warms up, on a piece that is long enough to merge
            part = ids if repeat else ids[:, : options.max_entries + 2 * options.window]
            start, start_processors = time.perf_counter(), time.process_time()
            prefill(model, part, cache)
            taken = time.perf_counter() - start
            if repeat:
                seconds[way].append(taken)
                of_processors[way].append(time.process_time() - start_processors)
                print(f"{way}: {taken:.2f} s", file=sys.stderr, flush=True)
    return seconds, of_processors


def peak(options: argparse.Namespace) -> dict[str, int]:
    """Bytes resident at the peak of one prefill, in this process, and before it."""
    model = load_model(options.model)[0]
    ids = prompt(model, options.tokens)
    prefill(model, ids[:, :16], cache_of("full", model, 16, 0, 1))  # threads and lazily made tables
    reset_peak()
    before = resident_nbytes()
    cache = cache_of(options.peak_of, model, options.tokens, options.max_entries, options.window)
    prefill(model, ids, cache, chunk=options.chunk)
    return {"peak_bytes": resident_nbytes("VmHWM"), "before_bytes": before}


def peak_alone(options: argparse.Namespace, way: str, tokens: int) -> dict[str, int]:
    """`peak` in a process of its own.

    Raises:
        UserError: the process failed.
    """
    command = [sys.executable, "-m", __spec__.name, "--peak-of", way, "--tokens", str(tokens)]
    for name in ("model", "max_entries", "window", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    # Chunks as long as the windows for all: the activations of a long chunk would hide what the caches hold.
    result = subprocess.run([*command, "--chunk", str(options.window)], capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the process that measures the peak of {way} ended with {result.returncode}: {reason}")
    found: dict[str, int] = json.loads(result.stdout.strip().splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument(
        "--long", type=int, default=8192, help="tokens of the last comparison of peaks; 0 leaves it out"
    )
    parser.add_argument("--max-entries", type=int, default=1024)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-peaks", action="store_true", help="times alone")
    parser.add_argument("--chunk", type=int, default=PREFILL_CHUNK, help=argparse.SUPPRESS)
    parser.add_argument("--peak-of", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print(json.dumps(peak(options)))
        return
    model = load_model(options.model)[0]
    check_length(model, max(options.tokens, options.long), "the prompt of the measurement")
    seconds, of_processors = times(model, options)
    del model
    peaks, long = {}, {}
    if not options.no_peaks:
        peaks = {way: peak_alone(options, way, options.tokens) for way in WAYS}
        long = {way: peak_alone(options, way, options.long) for way in LONG} if options.long else {}
    print(json.dumps(report(options, seconds, of_processors, peaks, long)))


def report(
    options: argparse.Namespace,
    seconds: dict[str, list[float]],
    of_processors: dict[str, list[float]],
    peaks: dict[str, dict[str, int]],
    long: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """All that was measured, and KVSlimmer in relation to the other ways."""

    def added(found: dict[str, int]) -> int:
        return found["peak_bytes"] - found["before_bytes"]

    made: dict[str, Any] = {
        key: getattr(options, key) for key in ("model", "tokens", "max_entries", "window", "threads")
    }
    middle = {way: statistics.median(taken) for way, taken in seconds.items()}
    busy = {way: statistics.median(taken) for way, taken in of_processors.items()}
    made |= {"seconds": middle, "processor_seconds": busy, "all_seconds": seconds, "peaks": peaks}
    for way in WAYS:
        if way != "kvslimmer":
            made[f"kvslimmer_time_over_{way}"] = middle["kvslimmer"] / middle[way]
            made[f"kvslimmer_processor_time_over_{way}"] = busy["kvslimmer"] / busy[way]
            if not peaks:
                continue
            made[f"kvslimmer_peak_over_{way}"] = added(peaks["kvslimmer"]) / added(peaks[way])
    if long:
        made |= {"long_tokens": options.long, "long_peaks": long}
        made["long_kvslimmer_peak_over_full"] = added(long["kvslimmer"]) / added(long["full"])
    return made


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"kvgauge: {error}", file=sys.stderr)
        raise SystemExit(2) from None
