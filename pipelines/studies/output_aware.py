"""What output-aware metrics, rank allocation and exact sinks are worth to shared subspaces, at equal bytes.

    python -m pipelines.studies.output_aware --model smollm2-135m --tokens 1024 --prompts 3

The KL divergence (nats a token) of a continuation's next-token distributions from the uncompressed model's, for the SVD
of xKV in four metrics (plain, value-weighted, key-weighted, both) times three allocations (uniform, energy, greedy)
times sinks, on the same held-out prompts, each prefilled once. Every cell is paired with the plain uniform one of its
budget and sinks, prompt by prompt. Then what starves: the loss of every layer's attention output when its keys, or its
values, are those of the plain uniform subspaces, and what of it remains once the first tokens are put back exactly.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from kvgauge import configuration
from kvgauge.architecture.facts import check_length, full_nbytes, model_facts
from kvgauge.calibration.allocation import ALLOCATIONS
from kvgauge.calibration.collecting import collect
from kvgauge.calibration.moments import Moments
from kvgauge.calibration.output_error import held_out_layers
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.fitting import fit_config, learns
from kvgauge.contract.method import Method
from kvgauge.corpora.corpus import load_corpus, load_held_out
from kvgauge.errors import UserError, unknown
from kvgauge.evaluation.decoding import prefill
from kvgauge.evaluation.statistics import sign_test
from kvgauge.layers.cache import KVCache
from kvgauge.methods.registry import build_method
from kvgauge.models.loading import load_model

METRICS: Mapping[str, Mapping[str, bool] | None] = {
    "plain": None,
    "values": {"values": True},
    "keys": {"keys": True},
    "both": {"keys": True, "values": True},
}
SINKS = 4  # put back in the second measurement of what starves


@dataclass(frozen=True)
class Cell:
    """One setting.

    Attributes:
        metric: one of `METRICS`.
        allocate: one of `ALLOCATIONS`.
        sinks: exact first tokens.
        budget: share of the bytes.
    """

    metric: str
    allocate: str
    sinks: int
    budget: float

    @property
    def reference(self) -> Cell:
        """What it is paired with."""
        return Cell("plain", "uniform", self.sinks, self.budget)

    def method(self, group_size: int) -> Method:
        """xKV at this setting."""
        options = {"allocate": self.allocate, "sinks": self.sinks, "whiten": METRICS[self.metric]}
        return build_method("xkv", budget=self.budget, group_size=group_size, **options)


class Prompt:
    """One context with its exact cache, and what the uncompressed model makes of the continuation.

    Args:
        model: the exact reference.
        tokens: (1, tokens) of context and continuation.
        context_length: of the context.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, tokens: Tensor, context_length: int) -> None:
        self.continuation = tokens[:, context_length:]
        self.exact = _full_cache(model)
        prefill(model, tokens[:, :context_length], self.exact)
        copy = _full_cache(model)
        copy.adopt(self.exact)
        copy.compress()
        self.expected = self._distribution(model, copy)

    @torch.no_grad()
    def kl(self, model: PreTrainedModel, method: Method, fitted: Fitted | None) -> tuple[float, int]:
        """KL divergence from the uncompressed model, nats a token, and the bytes of the compressed context."""
        cache = method.new_cache(model, fitted)
        cache.adopt(self.exact)
        cache.compress()
        nbytes = cache.nbytes()
        actual = self._distribution(model, cache)
        return float((self.expected.exp() * (self.expected - actual)).sum(-1).mean()), nbytes

    def _distribution(self, model: PreTrainedModel, cache: KVCache) -> Tensor:
        logits = model(input_ids=self.continuation, past_key_values=cache, use_cache=True).logits[0]
        return logits.double().log_softmax(-1)


def _full_cache(model: PreTrainedModel) -> KVCache:
    return build_method("full").new_cache(model)


def divergences(
    model: PreTrainedModel, moments: Moments, prompts: Sequence[Prompt], cells: Sequence[Cell], group_size: int
) -> dict[Cell, list[tuple[float, int]]]:
    """(KL, bytes) of every cell on every prompt; cells that differ by their budget alone share a fit."""
    fits: dict[str, Fitted | None] = {}
    measured = {}
    for cell in tqdm(cells, desc="cells"):
        method = cell.method(group_size)
        key = configuration.digest(fit_config(method)) if learns(method) else ""
        if key not in fits:
            fits[key] = method.fit(moments, model)
        measured[cell] = [prompt.kl(model, method, fits[key]) for prompt in prompts]
    return measured


def paired(measured: Mapping[Cell, Sequence[tuple[float, int]]], full: int) -> Iterator[dict[str, Any]]:
    """A row per cell: its mean KL, and the geometric mean of its ratios to the reference's, prompt by prompt.

    Args:
        measured: (KL, bytes) per prompt.
        full: bytes of the uncompressed cache of one context.
    """
    for cell, results in measured.items():
        kls = [kl for kl, _ in results]
        reference = [kl for kl, _ in measured[cell.reference]]
        logs = [math.log(mine / theirs) for mine, theirs in zip(kls, reference, strict=True)]
        yield asdict(cell) | {
            "kl": fmean(kls),
            "kl_per_prompt": kls,
            "share_of_bytes": fmean(nbytes for _, nbytes in results) / full,
            "ratio": math.exp(fmean(logs)),
            "better_on": sum(log < 0 for log in logs),
            "sign_test": sign_test(logs),
        }


@torch.no_grad()
def starved(
    model: PreTrainedModel, sequences: Tensor, budget: float, group_size: int
) -> Iterator[dict[str, float | int | str]]:
    """Per layer and part the loss of the plain uniform subspaces, and what remains with exact first tokens.

    Args:
        model: the exact reference.
        sequences: token ids (sequences, tokens).
        budget, group_size: of xKV without sinks.
    """
    method = Cell("plain", "uniform", 0, budget).method(group_size)
    totals = torch.zeros(model_facts(model).num_layers, 2, 2, dtype=torch.float64)
    for ids, layers in zip(sequences.split(1), held_out_layers(model, sequences), strict=True):
        cache = method.new_cache(model)
        prefill(model, ids.to(model.device), cache)
        cache.compress()
        for index, layer in enumerate(layers):
            exact = (layer.seen.keys, layer.seen.values)
            for part, guess in enumerate(cache.dense(index)):
                restored = torch.cat([exact[part][:, :, :SINKS], guess[:, :, SINKS:]], dim=2)
                for column, states in enumerate((guess, restored)):
                    both = (states, exact[1]) if part == 0 else (exact[0], states)
                    totals[index, part, column] += layer.loss(*both) / len(sequences)
    for index, parts in enumerate(totals.tolist()):
        for name, (loss, restored_loss) in zip(("keys", "values"), parts, strict=True):
            yield {"layer": index, "part": name, "loss": loss, "loss_with_exact_sinks": restored_loss}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Metrics, allocations and sinks of xKV at equal bytes.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=1024, help="of the context")
    parser.add_argument("--continuation", type=int, default=64, help="tokens whose distributions are compared")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--calibration", type=int, default=4, help="sequences of --tokens tokens")
    parser.add_argument("--group-size", type=int, default=5)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--sinks", type=int, nargs="+", default=[4])
    parser.add_argument("--metrics", nargs="+", default=list(METRICS))
    parser.add_argument("--allocations", nargs="+", default=list(ALLOCATIONS))
    parser.add_argument("--seed", type=int, default=0, help="which windows of the corpus are taken")
    options = parser.parse_args(arguments)
    try:
        print(json.dumps(vars(options) | run(options)))
    except UserError as error:
        sys.exit(f"output_aware: {error}")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Both measurements.

    Raises:
        UserError: an unknown metric or allocation, no prompt, or prompts longer than the model's positions.
    """
    for kind, names, known in (
        ("metric", options.metrics, METRICS),
        ("allocation", options.allocations, ALLOCATIONS),
    ):
        for name in names:
            if name not in known:
                raise unknown(kind, name, known)
    if options.prompts < 1 or options.continuation < 1:
        raise UserError("a KL needs at least one prompt and one token of continuation: raise --prompts, --continuation")
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    check_length(model, options.tokens + options.continuation, "a prompt with its continuation")
    node = configuration.read("corpus", "essays")
    sizes = {"sequence_length": options.tokens, "num_sequences": options.calibration, "seed": options.seed}
    corpus = configuration.build(node, "corpus", **sizes)
    longer = {"sequence_length": options.tokens + options.continuation, "num_sequences": options.prompts}
    texts = load_corpus(configuration.build(node, "corpus", seed=options.seed, **longer), tokenizer, "validation")
    held_out = load_held_out(corpus, tokenizer)
    moments = collect(model, load_corpus(corpus, tokenizer, "calibration").split(1), held_out=held_out)
    prompts = [Prompt(model, ids.to(model.device), options.tokens) for ids in texts.split(1)]
    cells = [
        Cell(metric, allocate, sinks, budget)
        for metric in dict.fromkeys(["plain", *options.metrics])
        for allocate in dict.fromkeys(["uniform", *options.allocations])
        for sinks in options.sinks
        for budget in options.budgets
    ]
    measured = divergences(model, moments, prompts, cells, options.group_size)
    return {
        "cells": list(paired(measured, full_nbytes(model, options.tokens))),
        "starved": list(starved(model, held_out[:1], options.budgets[0], options.group_size)),
    }


if __name__ == "__main__":
    main()
