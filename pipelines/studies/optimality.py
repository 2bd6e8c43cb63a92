"""The theorem on a real model: KQ-SVD's pair is the Eckart–Young optimum of K Qᵀ, and beats the others on it.

    python -m pipelines.studies.optimality --model smollm2-135m

Fits the three per-head methods on the tokens of one sequence and compares the error of every layer and kv-head with
the tail of an explicit SVD of ``K Qᵀ`` in float64, then counts wins on held-out sequences with a fit on other tokens.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from kvgauge import configuration
from kvgauge.calibration.collecting import collect
from kvgauge.contract.fitted import Fitted
from kvgauge.corpora.corpus import load_corpus
from kvgauge.layers.observing import Observation
from kvgauge.measure.fidelity import observe
from kvgauge.methods.registry import build_method
from kvgauge.models.loading import load_model

METHODS = ("ksvd", "eigen", "kqsvd")
RANKS = (8, 16, 24, 32, 48)


def key_query_errors(fitted: Fitted, rank: int, seen: Observation) -> Tensor:
    """``‖K Qᵀ − K A Bᵀ Qᵀ‖²`` of every kv-head of a layer, by the dense formula in float64: (num_key_value_heads,)."""
    A, B = (pair.double() for pair in fitted.truncated(seen.layer, rank, rank)[:2])
    K, Q = stacked(seen)
    return (K @ Q.mT - (K @ A) @ (Q @ B).mT).square().sum((1, 2))


def stacked(seen: Observation) -> tuple[Tensor, Tensor]:
    """K (N, tokens, head_dim) and the group's queries (N, g · tokens, head_dim) of one sequence, float64."""
    K = seen.keys[0].double()
    return K, seen.queries[0].double().unflatten(0, (K.shape[0], -1)).flatten(1, 2)


def fits(model: PreTrainedModel, sequences: Tensor) -> dict[str, Fitted]:
    """The three methods fitted on `sequences`."""
    moments = collect(model, sequences.split(1))
    fitted = {name: build_method(name, budget=0.5).fit(moments, model) for name in METHODS}
    return {name: known for name, known in fitted.items() if known is not None}


def on_fitted_tokens(model: PreTrainedModel, ids: Tensor, ranks: Sequence[int]) -> dict[str, Any]:
    """Largest relative distance from the explicit optimum, and how often KQ-SVD is at least as good as the others."""
    known = fits(model, ids)
    worst, cases, wins = 0.0, 0, 0
    for seen in tqdm(observe(model, ids), desc="fitted tokens", unit="layer"):
        K, Q = stacked(seen)
        spectrum = torch.linalg.svdvals(K @ Q.mT)
        for rank in ranks:
            tail = spectrum[:, rank:].square().sum(1)
            errors = {name: key_query_errors(fitted, rank, seen) for name, fitted in known.items()}
            worst = max(worst, float(((errors["kqsvd"] - tail).abs() / tail).max()))
            others = torch.minimum(errors["ksvd"], errors["eigen"])
            cases += len(tail)
            wins += int((errors["kqsvd"] <= others * (1 + 1e-9)).sum())
    return {"largest_relative_distance_from_optimum": worst, "cases": cases, "kqsvd_best": wins}


def on_held_out_tokens(
    model: PreTrainedModel, known: dict[str, Fitted], ids: Tensor, ranks: Sequence[int]
) -> dict[str, Any]:
    """How often KQ-SVD is at least as good on tokens that it was not fitted on, per rank."""
    cases = 0
    wins = dict.fromkeys(ranks, 0)
    for seen in tqdm(observe(model, ids), desc="held-out tokens", unit="layer"):
        cases += seen.keys.shape[1]
        for rank in ranks:
            errors = {name: key_query_errors(fitted, rank, seen) for name, fitted in known.items()}
            wins[rank] += int((errors["kqsvd"] <= torch.minimum(errors["ksvd"], errors["eigen"])).sum())
    return {"cases_per_rank": cases, "kqsvd_best": {str(rank): count for rank, count in wins.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the sequence that is fitted and factored")
    parser.add_argument("--sequences", type=int, default=4, help="calibration sequences of the held-out comparison")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model)
    node = configuration.read("corpus", "essays") | {"num_sequences": arguments.sequences}
    corpus = configuration.build(node, "corpus")
    calibration = load_corpus(corpus, tokenizer, "calibration")
    validation = load_corpus(corpus, tokenizer, "validation")
    held_out = validation[:1, : arguments.tokens]
    result = {
        "model": arguments.model,
        "ranks": RANKS,
        "fitted": on_fitted_tokens(model, calibration[:1, : arguments.tokens], RANKS),
        "held_out": on_held_out_tokens(model, fits(model, calibration), held_out, RANKS),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
