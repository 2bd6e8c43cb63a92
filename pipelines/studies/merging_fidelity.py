"""What the options of the merging family cost: the error of one merge, layer by layer, and the KL of a continuation.

    python -m pipelines.studies.merging_fidelity --tokens 1024 --contexts 4

Held-out essays. One merge: every layer's exact keys and values of a context are merged once, as one window, to a share
of its tokens; the queries of the continuation attend to them, and the relative error of the attention output (through
W_O) is what the merge alone costs. KL: the context is read window by window at the same share of the bytes, and the
next-token distributions of the continuation are compared with the uncompressed model's, in nats a token. Every variant
is paired with the first, context by context. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from kvgauge import configuration
from kvgauge.architecture.facts import check_length, model_facts, output_weight
from kvgauge.architecture.rotary import layer_rotaries
from kvgauge.attend.counted_attention import cardinality_attention
from kvgauge.corpora.corpus import load_corpus
from kvgauge.errors import UserError, unknown
from kvgauge.evaluation.statistics import sign_test
from kvgauge.layers.cache import KVCache
from kvgauge.layers.observing import Observation
from kvgauge.measure.fidelity import compress_context, observe
from kvgauge.methods.merging.merging import Streaming
from kvgauge.methods.merging.merging_entries import MergingEntries
from kvgauge.methods.merging.positions import NewTokens, RunningPositions
from kvgauge.methods.merging.tally import Tally
from kvgauge.methods.merging.windows import Windows
from kvgauge.methods.registry import build_method
from kvgauge.models.loading import load_model
from kvgauge.stage import fail

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "chain-clip": {"method": "kvslimmer", "pairs": "chain", "clip": 5},
    "chain": {"method": "kvslimmer", "pairs": "chain", "clip": None},
    "bounded": {"method": "kvslimmer", "pairs": "bounded", "clip": 5},
    "disjoint": {"method": "kvslimmer", "pairs": "disjoint", "clip": 5},
    "drop": {"method": "kvslimmer", "pairs": "drop", "clip": 5},
    "published": {"method": "kvslimmer", "published": True},
    "chain-attention": {"method": "kvslimmer", "pairs": "chain", "clip": None, "cost": "attention"},
    "residual": {"method": "kvslimmer", "pairs": "chain", "clip": None, "cost": "residual"},
    "both": {"method": "kvslimmer", "pairs": "chain", "clip": None, "cost": "both"},
    "mean": {"method": "mean_merge", "pairs": "chain", "clip": None},
    "streaming_llm": {"method": "streaming_llm"},
}


def variant(name: str, **sizes: Any) -> Streaming:
    """One of `VARIANTS`."""
    options = dict(VARIANTS[name])
    method = build_method(options.pop("method"), **options, **sizes)
    assert isinstance(method, Streaming)
    return method


@torch.no_grad()
def one_merge(model: PreTrainedModel, method: Streaming, seen: Observation, context: int, share: float) -> float:
    """Relative error of a layer's attention output for the tokens behind a context that was merged once.

    Args:
        model: whose layer it is.
        method: of the merging family.
        seen: exact states (1, heads, tokens, head_dim) of context and continuation, at the model's positions.
        context: tokens that are merged, as one window.
        share: of the context that is kept, in entries.
    """
    limit = round(share * context)
    rotary = layer_rotaries(model)[seen.layer]
    entries = MergingEntries(
        method.policy(model_facts(model)), Windows(context, lambda: [limit]), RunningPositions(rotary), Tally()
    )
    entries.windows.begin(1)
    entries.positions.begin([0])
    past, later, scaling = slice(0, context), slice(context, None), seen.keys.shape[-1] ** -0.5
    entries.append(seen.keys[:, :, past], seen.values[:, :, past], None)
    entries.attend(seen.queries[:, :, past], scaling)
    entries.end_windows()
    query, keys = seen.queries[:, :, later], seen.keys[:, :, later]
    if entries.policy.ahead:
        entries.look_ahead(query, keys, NewTokens(), scaling)
    query, keys = entries.positions.place(query, keys, None)
    entries.append(keys, seen.values[:, :, later], None)
    expected = cardinality_attention(seen.queries[:, :, later], seen.keys, seen.values, None, scaling)
    weight = output_weight(model, seen.layer).double()
    exact = torch.einsum("bthd,hdm->btm", expected.double(), weight)
    found = torch.einsum("bthd,hdm->btm", entries.attend(query, scaling).double(), weight)
    return float((found - exact).norm() / exact.norm())


@torch.no_grad()
def next_tokens(model: PreTrainedModel, ids: Tensor, last: int, cache: KVCache | None = None) -> Tensor:
    """Log-probabilities (last, vocabulary) of the tokens behind the `last` ones of `ids`, after what `cache` holds."""
    logits = model(input_ids=ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=last).logits[0]
    return logits.double().log_softmax(-1)


def against_first(values: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Means, and geometric means of the ratios to the first variant's, paired."""
    first = next(iter(values))
    rows = {}
    for name, mine in values.items():
        logs = [math.log(a / b) for a, b in zip(mine, values[first], strict=True)]
        rows[name] = {
            "mean": fmean(mine),
            "each": list(mine),
            "ratio": math.exp(fmean(logs)),
            "better_on": sum(log < 0 for log in logs),
            "sign_test": sign_test(logs),
        }
    return rows


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Both measurements.

    Raises:
        UserError: an unknown variant, or contexts longer than the model's positions.
    """
    for name in options.variants:
        if name not in VARIANTS:
            raise unknown("variant", name, VARIANTS)
    model, tokenizer = load_model(options.model)
    total = options.tokens + options.continuation
    check_length(model, total, "a context with its continuation")
    sizes = {"sequence_length": total, "num_sequences": options.contexts, "seed": options.seed}
    corpus = configuration.build(configuration.read("corpus", "essays"), "corpus", **sizes)
    kl: dict[str, list[float]] = defaultdict(list)
    errors: dict[str, list[list[float]]] = defaultdict(list)
    texts = load_corpus(corpus, tokenizer, "validation").split(1)
    for ids in tqdm(texts, desc="contexts"):
        context, continuation = ids[:, : options.tokens], ids[:, options.tokens :]
        states = observe(model, ids)
        expected = next_tokens(model, ids, options.continuation)
        for name in options.variants:
            once = variant(name, max_entries=round(options.share * options.tokens), window=options.tokens, budget=None)
            errors[name].append([one_merge(model, once, seen, options.tokens, options.share) for seen in states])
            method = variant(name, budget=options.share, window=options.window)
            cache = compress_context(model, method, None, context)
            found = next_tokens(model, continuation, options.continuation, cache)
            kl[name].append(float((expected.exp() * (expected - found)).sum(-1).mean()))
    layers = {name: [fmean(layer) for layer in zip(*rows, strict=True)] for name, rows in errors.items()}
    return {"one_merge_output_error": against_first(layers), "kl": against_first(kl)}


def main() -> None:
    parser = argparse.ArgumentParser(description="The error of one merge, and the KL of a continuation.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=1024, help="of the context")
    parser.add_argument("--continuation", type=int, default=128)
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.5, help="of the entries, and of the bytes")
    parser.add_argument("--window", type=int, default=256, help="tokens between two merges while the context is read")
    parser.add_argument("--seed", type=int, default=0, help="which parts of the essays are taken")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    options = parser.parse_args()
    try:
        found = run(options)
    except UserError as error:
        fail(str(error))
    for measure, rows in found.items():
        for name, row in rows.items():
            print(f"{measure:24} {name:16} {row['mean']:.4f}  ratio {row['ratio']:.2f}  p {row['sign_test']:.3f}")
    print(json.dumps(vars(options) | found))


if __name__ == "__main__":
    main()
