"""What xKV's compression costs: its subspaces against `torch.linalg.svd` of the same matrices, in turns.

    python -m pipelines.studies.svd_time --model smollm2-135m --tokens 4096 --group-size 5 --budget 0.25

The matrices are the keys before the rotation and the values of one prompt, one pair per group of layers. Every matrix
is factored by each way, one after the other, at the ranks of the budget; the least of the repeats counts. `excess` is
how far the worst reconstruction error of a way lies above that of the explicit SVD. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge import configuration
from kvgauge.architecture.facts import model_facts
from kvgauge.architecture.frequencies import layer_plane_rotations
from kvgauge.corpora.corpus import load_corpus
from kvgauge.evaluation.decoding import prefill
from kvgauge.methods.across_layers.group import CrossLayerGroup, CrossLayerSettings
from kvgauge.methods.across_layers.subspace import TruncatedSVD
from kvgauge.methods.across_layers.xkv import XKV
from kvgauge.methods.registry import build_method
from kvgauge.models.loading import load_model

Factor = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def explicit(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The truncated SVD as the textbook has it."""
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    return left[:, :rank] * values[:rank], right[:rank].T


WAYS: dict[str, Factor] = {
    "torch.linalg.svd": explicit,
    "exact": TruncatedSVD(),
    "randomized": TruncatedSVD(randomized=True),
}


def matrices(model: PreTrainedModel, ids: Tensor, method: XKV) -> Iterator[tuple[Tensor, int]]:
    """(tokens, features) of every group's keys and values with the rank that the method gives them."""
    facts = model_facts(model)
    cache = build_method("full").new_cache(model)
    prefill(model, ids, cache)
    ranks = method.ranks(facts, ids.shape[1])
    rotations = layer_plane_rotations(model)
    for layers, (rank_k, rank_v) in zip(method.groups(facts.num_layers), ranks, strict=True):
        turned = [rotations[layer] for layer in layers]
        group = CrossLayerGroup(len(layers), lambda tokens: (1, 1), CrossLayerSettings(), rotations=turned)
        keys, values = zip(*(cache.dense(layer) for layer in layers), strict=True)
        yield torch.cat([group.key_rows(member, part)[0] for member, part in enumerate(keys)], dim=-1), rank_k
        yield torch.cat([group.value_rows(part)[0] for part in values], dim=-1), rank_v


def error(rows: Tensor, basis: Tensor, factor: Tensor) -> float:
    return float((rows.double() - basis.double() @ factor.double().T).norm())


def measure(model: PreTrainedModel, ids: Tensor, method: XKV, repeats: int) -> dict[str, object]:
    """Seconds of every way over all groups, and their errors above that of the explicit SVD."""
    seconds: dict[str, float] = defaultdict(float)
    excess: dict[str, float] = defaultdict(float)
    shapes = set()
    for rows, rank in matrices(model, ids, method):
        shapes.add((*rows.shape, rank))
        best = dict.fromkeys(WAYS, float("inf"))
        errors = {}
        for _ in range(repeats):
            for name, factorise in WAYS.items():
                start = time.perf_counter()
                basis, factor = factorise(rows, rank)
                best[name] = min(best[name], time.perf_counter() - start)
                errors[name] = error(rows, basis, factor)
        for name, duration in best.items():
            seconds[name] += duration
            excess[name] = max(excess[name], errors[name] / errors["torch.linalg.svd"] - 1.0)
    reference = seconds["torch.linalg.svd"]
    return {
        "matrices": sorted(shapes),
        "seconds": dict(seconds),
        "speedup": {name: reference / duration for name, duration in seconds.items()},
        "excess": dict(excess),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of xKV's SVD against torch.linalg.svd of the same matrices.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--group-size", type=int, default=5)
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    node = configuration.read("corpus", "essays")
    corpus = configuration.build(node, "corpus", sequence_length=options.tokens, num_sequences=1)
    ids = load_corpus(corpus, tokenizer, "calibration").to(model.device)
    method = build_method("xkv", group_size=options.group_size, budget=options.budget)
    assert isinstance(method, XKV)
    result = measure(model, ids, method, options.repeats)
    print(json.dumps({**vars(options), "threads": torch.get_num_threads(), **result}))


if __name__ == "__main__":
    main()
