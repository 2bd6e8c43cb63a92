"""The observations that the three papers build on, measured on one model and held-out essays, with intervals.

    python -m pipelines.studies.claims --model smollm2-135m --sequences 4

- KQ-SVD (arXiv 2512.05916): the relative errors of ``K Qᵀ`` and of the attention output at several ranks beside K-SVD's
  and Eigen's, on tokens that none was fitted on, and the ranks at ε = 0.1. That it is optimal on the tokens it was
  fitted on is `pipelines.studies.optimality`.
- xKV (arXiv 2503.18893): the cosine of a token in two adjacent layers, centred kernel alignment, and the overlap of the
  dominant left singular vectors, beside that of unrelated subspaces.
- KVSlimmer (arXiv 2603.00907): spectra of W_Q, W_K and W_V, and cosines of the keys and values of adjacent tokens
  beside those of tokens far apart.

Intervals are 95% bootstrap intervals over layers (pairs of adjacent layers for xKV). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from kvgauge import configuration
from kvgauge.architecture.facts import model_facts
from kvgauge.calibration.collecting import collect
from kvgauge.corpora.corpus import load_corpus
from kvgauge.errors import UserError
from kvgauge.evaluation.statistics import stratified_intervals
from kvgauge.measure.alignment import layer_alignment
from kvgauge.measure.asymmetry import FAR, cosine_rows, weight_rows
from kvgauge.measure.fidelity import projection_errors
from kvgauge.methods.per_head.low_rank import LowRankPerHead
from kvgauge.methods.registry import build_method
from kvgauge.models.loading import load_model
from kvgauge.stage import fail

from .optimality import METHODS

SHARES = (0.25, 0.5, 0.75)  # of head_dim: the ranks
EPSILON = 0.1
ALIGNED = 64  # dominant directions that are compared


def interval(values: Sequence[float], bounds: tuple[float, float] = (-1.0, 1.0)) -> dict[str, float]:
    """Mean and 95% bootstrap interval of values within `bounds`."""
    row = np.asarray([values], dtype=np.float64)
    mean, low, high = stratified_intervals([row], np.ones(1), bounds, 0, 10_000, 0.95)
    return {"mean": float(mean[0]), "low": float(low[0]), "high": float(high[0])}


def per_head(model: PreTrainedModel, calibration: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Errors of the three per-head methods on held-out tokens, and their ε-ranks."""
    moments = collect(model, calibration.split(1))
    ranks = [round(share * model_facts(model).head_dim) for share in SHARES]
    errors: dict[tuple[str, str, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    at_epsilon = {}
    for name in METHODS:
        method = build_method(name, epsilon=EPSILON, budget=None)
        assert isinstance(method, LowRankPerHead)
        fitted = method.fit(moments, model)
        chosen = method.ranks(fitted, model_facts(model))
        at_epsilon[name] = {"keys": fmean(k for k, _ in chosen), "values": fmean(v for _, v in chosen)}
        for ids in tqdm(held_out.split(1), desc=name):
            for row in projection_errors(model, fitted, "post", [(rank, rank) for rank in ranks], ids):
                if row["quantity"] in ("KQ", "output"):
                    errors[name, str(row["quantity"]), int(str(row["rank_k"]))][int(str(row["layer"]))].append(
                        float(str(row["error"]))
                    )
    return {"errors": list(_error_rows(errors)), "epsilon": EPSILON, "epsilon_ranks": at_epsilon}


def _error_rows(errors: Mapping[tuple[str, str, int], Mapping[int, Sequence[float]]]) -> list[dict[str, Any]]:
    layers = {key: [fmean(rows[layer]) for layer in sorted(rows)] for key, rows in errors.items()}
    rows = []
    for quantity, rank in sorted({key[1:] for key in layers}):
        mine = layers["kqsvd", quantity, rank]
        row: dict[str, Any] = {"quantity": quantity, "rank": rank, "layers": len(mine)}
        row |= {name: fmean(layers[name, quantity, rank]) for name in METHODS}
        for other in METHODS[:-1]:
            theirs = layers[other, quantity, rank]
            row[f"below_{other}"] = interval([float(a < b) for a, b in zip(mine, theirs, strict=True)], (0.0, 1.0))
        rows.append(row)
    return rows


def across_layers(model: PreTrainedModel, held_out: Tensor) -> dict[str, Any]:
    """How alike adjacent layers are, as `kvgauge.measure.alignment` measures it."""
    features = model_facts(model).num_key_value_heads * model_facts(model).head_dim
    rank = min(ALIGNED, features, held_out.shape[1])
    matrices = layer_alignment(model, held_out.split(1), rank)
    adjacent = {name: interval(matrix.diagonal(1).tolist()) for name, matrix in matrices.items()}
    return {"rank": rank, "unrelated_subspaces": rank / held_out.shape[1], "adjacent_layers": adjacent}


def asymmetry(model: PreTrainedModel, held_out: Tensor) -> dict[str, Any]:
    """Spectra of the projections, and cosines of keys and values of adjacent tokens."""
    ranks: dict[str, list[float]] = defaultdict(list)
    quarters: dict[str, list[float]] = defaultdict(list)
    for row in weight_rows(model):
        ranks[row["quantity"]].append(row["effective_rank"])
        quarters[row["quantity"]].append(row["top_quarter"])
    cosines: dict[str, list[float]] = defaultdict(list)
    for row in cosine_rows(model, held_out.split(1), (1, min(FAR, held_out.shape[1] - 1))):
        cosines[f"{row['quantity']} at {row['distance']}"].append(row["cosine"])
    concentrated = {
        name: interval([float(a < b) for a, b in zip(ranks[name], ranks["W_V"], strict=True)], (0.0, 1.0))
        for name in ("W_Q", "W_K")
    }
    return {
        "effective_rank": {name: interval(values) for name, values in ranks.items()},
        "energy_in_the_first_quarter": {name: interval(values) for name, values in quarters.items()},
        "layers_more_concentrated_than_W_V": concentrated,
        "cosine": {name: interval(values) for name, values in cosines.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The observations that the three papers build on.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=4, help="held-out ones, and as many for calibration")
    options = parser.parse_args()
    try:
        model, tokenizer = load_model(options.model)
        sizes = {"sequence_length": options.tokens, "num_sequences": options.sequences}
        corpus = configuration.build(configuration.read("corpus", "essays"), "corpus", **sizes)
        calibration, held_out = (load_corpus(corpus, tokenizer, split) for split in ("calibration", "validation"))
        found = {
            "per_head": per_head(model, calibration, held_out),
            "across_layers": across_layers(model, held_out),
            "asymmetry": asymmetry(model, held_out),
        }
    except UserError as error:
        fail(str(error))
    print(json.dumps(vars(options) | found))


if __name__ == "__main__":
    main()
