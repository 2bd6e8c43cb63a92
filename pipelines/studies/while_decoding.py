"""Caches that compress while they answer, step beside step: bytes over the budget, time per token, and the next token.

    python -m pipelines.studies.while_decoding --model smollm2-135m --context 512 --answer 512 --every 64

All cells read one held-out text as their context, and then, token by token, what the uncompressed cache writes behind
it: so they compress the same tokens, and what they would have written says how close they are. In every step all cells
take their turn: a slow minute slows all of them, and their times are told as shares of the uncompressed cache's in the
same steps. A cell that refuses the model is left out. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.architecture.facts import check_length, model_facts
from kvgauge.calibration.collecting import collect
from kvgauge.contract.budget import reference_nbytes
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.fitting import learns
from kvgauge.contract.method import Method, budget_in_force
from kvgauge.contract.while_decoding import cell_label, new_cache
from kvgauge.corpora.corpus import CorpusConfig, load_corpus
from kvgauge.errors import UserError
from kvgauge.evaluation.decoding import prefill
from kvgauge.layers.cache import KVCache
from kvgauge.measure.bandwidth import synchronize
from kvgauge.methods.registry import build_method
from kvgauge.models.loading import load_model

# (name, options, budgets): latents with sinks, and 4 bits where they fit, which is not below 0.28 of 16
CELLS: tuple[tuple[str, dict[str, Any], tuple[float, ...]], ...] = (
    ("xkv", {}, (0.5, 0.25)),
    ("kqsvd", {"sinks": 4}, (0.5, 0.25)),
    ("streaming_llm", {"start": 4}, (0.5, 0.25)),
    ("kvslimmer", {"start": 4}, (0.5, 0.25)),
    ("compose", {"name": "int4", "compose": ["full", "int4"]}, (0.5,)),
    ("compose", {"name": "int3", "compose": ["full", "int3"]}, (0.25,)),
)
FULL = "full"


@dataclass
class Run:
    """One cell on its way through the answer.

    Attributes:
        method: with its budget.
        cache: of it.
        seconds: of every step.
        right: for every step whether the most likely token is the uncompressed cache's.
        peak: most bytes at the end of a step, or before a compression.
    """

    method: Method
    cache: KVCache
    seconds: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    peak: int = 0


def methods(every: int) -> list[Method]:
    """The uncompressed cache, and `CELLS`."""
    made = [build_method(FULL)]
    for name, options, budgets in CELLS:
        made += [build_method(name, budget=budget, while_decoding={"every": every}, **options) for budget in budgets]
    return made


def fits(chosen: Sequence[Method], model: PreTrainedModel, calibration: Sequence[Tensor]) -> dict[str, Fitted | None]:
    """What each method learned, by its name."""
    moments = collect(model, calibration) if any(map(learns, chosen)) else None
    found: dict[str, Fitted | None] = {}
    for method in chosen:
        if method.name not in found:
            found[method.name] = method.fit(moments, model) if moments is not None and learns(method) else None
    return found


@torch.no_grad()
def measure(
    model: PreTrainedModel, chosen: Sequence[Method], context: Tensor, calibration: Sequence[Tensor], answer: int
) -> list[Run]:
    """Every cell through `answer` tokens behind `context` (1, tokens), the uncompressed one first."""
    learned = fits(chosen, model, calibration)
    runs = []
    for method in chosen:
        try:
            cache = new_cache(method, model, learned[method.name])
            logits = prefill(model, context, cache)
            cache.compress()
        except UserError as refusal:
            print(f"{cell_label(method)} is left out: {refusal}", file=sys.stderr, flush=True)
            continue
        runs.append(Run(method, cache))
        if method.name == FULL:
            token = logits.argmax(dim=-1, keepdim=True)
    for step in range(answer):
        written = token
        for run in runs:
            start = _now(model)
            logits = model(input_ids=token, past_key_values=run.cache, use_cache=True).logits[:, -1]
            run.seconds.append(_now(model) - start)
            choice = logits.argmax(dim=-1, keepdim=True)
            if run.method.name == FULL:
                written = choice
            run.right.append(bool(torch.equal(choice, written)))
            before = [one.before for one in run.cache.recompressions[-1:]]
            run.peak = max(run.peak, run.cache.nbytes(), *before)
        token = written
        if step % 64 == 63:
            print(f"{step + 1} of {answer} tokens", file=sys.stderr, flush=True)
    return runs


def report(model: PreTrainedModel, runs: Sequence[Run], context: int, part: int) -> list[dict[str, Any]]:
    """What was measured, a row per cell; times over `part` steps at the beginning and at the end."""
    facts, full, rows = model_facts(model), runs[0], []
    for run in runs:
        budget, tokens = budget_in_force(run.method), run.cache.get_seq_length()
        reference = reference_nbytes(run.method, facts, tokens)
        multiples = [
            one.after / (budget * reference_nbytes(run.method, facts, one.tokens))
            for one in run.cache.recompressions
            if budget is not None
        ]
        rows.append(
            {
                "cell": cell_label(run.method),
                "over_budget": max(multiples, default=None),
                "at_last_multiple": multiples[-1] if multiples else None,
                "compressed_context": run.cache.compressed_tokens,
                "multiples": [one.tokens for one in run.cache.recompressions],
                "end_bytes_ratio": run.cache.nbytes() / reference,
                "peak_bytes_ratio": run.peak / reference,
                "tpot_start_ms": 1e3 * statistics.median(run.seconds[:part]),
                "tpot_end_ms": 1e3 * statistics.median(run.seconds[-part:]),
                "tpot_start_over_full": _ratio(run.seconds[:part], full.seconds[:part]),
                "tpot_end_over_full": _ratio(run.seconds[-part:], full.seconds[-part:]),
                "compression_share": sum(one.seconds for one in run.cache.recompressions) / sum(run.seconds),
                "same_token": sum(run.right) / len(run.right),
            }
        )
    return rows


def _ratio(mine: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios of steps that were made one after the other."""
    return statistics.median(one / other for one, other in zip(mine, others, strict=True))


def _now(model: PreTrainedModel) -> float:
    synchronize(model.device)
    return time.perf_counter()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--context", type=int, default=512, help="tokens that are compressed first")
    parser.add_argument("--answer", type=int, default=512, help="tokens behind them")
    parser.add_argument("--every", type=int, default=64, help="tokens between two compressions")
    parser.add_argument("--part", type=int, default=64, help="steps whose times are taken together")
    parser.add_argument("--calibration", type=int, default=4, help="sequences of 512 tokens to learn from")
    options = parser.parse_args(arguments)
    if min(options.context, options.answer, options.every, options.part, options.calibration) < 1:
        raise UserError("context, answer, every, part and calibration are 1 or more")
    chosen = methods(options.every)  # refuses what is wrong before anything is loaded
    model, tokenizer = load_model(options.model)
    check_length(model, options.context + options.answer, "a context with its answer")
    held_out = CorpusConfig(sequence_length=options.context, num_sequences=1)
    text = load_corpus(held_out, tokenizer, "validation").to(model.device)
    calibration = [
        load_corpus(CorpusConfig(sequence_length=512, num_sequences=options.calibration), tokenizer, "calibration")
    ]
    runs = measure(model, chosen, text, calibration, options.answer)
    rows = report(model, runs, options.context, min(options.part, options.answer))
    for row in rows:
        print(
            f"{row['cell']:<22} over budget {_shown(row['over_budget'])}  end {row['end_bytes_ratio']:.3f}  "
            f"peak {row['peak_bytes_ratio']:.3f}  tpot/full {row['tpot_start_over_full']:.2f} → "
            f"{row['tpot_end_over_full']:.2f}  same token {row['same_token']:.2f}"
        )
    print(json.dumps(vars(options) | {"cells": rows}))


def _shown(number: float | None) -> str:
    return "  –  " if number is None else f"{number:.3f}"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"kvgauge: {error}", file=sys.stderr)
        raise SystemExit(2) from None
