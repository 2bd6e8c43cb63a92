"""What fitting costs: closed forms from moments, against factoring the stacked tokens, as the papers' codes do.

    python -m pipelines.studies.fit_cost --model smollm2-135m --sequences 8

Both ways fit the keys' and values' pairs of KQ-SVD for every layer and head on the same tokens, each in a process of
its own, so that its peak memory is its own. Collecting is timed against a plain forward pass of the same sequences,
in turns. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge import configuration
from kvgauge.architecture.facts import output_weight
from kvgauge.calibration.collecting import collect
from kvgauge.calibration.moments import Moments
from kvgauge.corpora.corpus import load_corpus
from kvgauge.measure.fidelity import observe
from kvgauge.measure.memory import resident_nbytes
from kvgauge.methods.registry import build_method
from kvgauge.models.loading import load_model

WAYS = ("moments", "stacked")


def stacked_pair(X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """The full-rank pair of ``X Yᵀ`` from the stacked rows: QR of both, SVD of the small core, pseudo-inverse.

    Args:
        X: (tokens, d), Y: (any, d), float64.

    Returns:
        A = X⁺ U and B = Xᵀ U, each (d, d), where ``X Yᵀ = U S Zᵀ``.
    """
    Q_X, R_X = torch.linalg.qr(X)
    R_Y = torch.linalg.qr(Y, mode="r").R
    U = Q_X @ torch.linalg.svd(R_X @ R_Y.mT).U
    return torch.linalg.pinv(R_X) @ (Q_X.mT @ U), X.mT @ U


def stacked_fit(model: PreTrainedModel, sequences: Tensor) -> dict[str, float]:
    """Keep every key, query and value of the corpus, then factor head by head."""
    start = time.perf_counter()
    kept: list[list[tuple[Tensor, Tensor, Tensor]]] = []
    for ids in sequences.split(1):
        kept.append([(seen.keys[0], seen.queries[0], seen.values[0]) for seen in observe(model, ids)])
    collected = time.perf_counter()
    for layer in range(len(kept[0])):
        keys, queries, values = (torch.cat([row[layer][part] for row in kept], dim=1) for part in range(3))
        heads = keys.shape[0]
        weights = output_weight(model, layer).unflatten(0, (heads, -1)).mean(1)
        for head in range(heads):
            group = queries.unflatten(0, (heads, -1))[head].flatten(0, 1)
            stacked_pair(keys[head].double(), group.double())
            stacked_pair(values[head].double(), weights[head].double().mT)
    return {"collect_s": collected - start, "fit_s": time.perf_counter() - collected}


def moments_fit(model: PreTrainedModel, sequences: Tensor) -> dict[str, float]:
    """Stream moments, sequence by sequence in turns with a plain forward pass, then the closed forms."""
    plain, collecting = [], []
    moments: Moments | None = None
    with torch.no_grad():
        model.get_decoder()(input_ids=sequences[:1])  # warm-up
    for ids in sequences.split(1):
        start = time.perf_counter()
        with torch.no_grad():
            model.get_decoder()(input_ids=ids)
        middle = time.perf_counter()
        more = collect(model, [ids])
        moments = more if moments is None else moments + more
        plain.append(middle - start)
        collecting.append(time.perf_counter() - middle)
    assert moments is not None
    method = build_method("kqsvd", budget=0.5)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        method.fit(moments, model)
        seconds.append(time.perf_counter() - start)
    ratios = [mine / theirs for mine, theirs in zip(collecting, plain, strict=True)]
    return {
        "collect_s": sum(collecting),
        "forward_s": sum(plain),
        "overhead": statistics.median(ratios) - 1,
        "fit_s": statistics.median(seconds),
    }


def measure(way: str, model_name: str, sequences: int) -> dict[str, Any]:
    """One way in this process."""
    model, tokenizer = load_model(model_name)
    node = configuration.read("corpus", "essays") | {"num_sequences": sequences}
    tokens = load_corpus(configuration.build(node, "corpus"), tokenizer, "calibration")
    before = resident_nbytes()
    figures = moments_fit(model, tokens) if way == "moments" else stacked_fit(model, tokens)
    return figures | {"tokens": tokens.numel(), "peak_bytes_above_model": resident_nbytes("VmHWM") - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sequences", type=int, default=8, help="sequences of 2,048 tokens")
    parser.add_argument("--way", choices=WAYS, help="measure one way in this process")
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments.way, arguments.model, arguments.sequences)))
        return
    found: dict[str, Any] = {}
    for way in WAYS:
        command = [sys.executable, "-m", __spec__.name, "--model", arguments.model]
        command += ["--sequences", str(arguments.sequences), "--way", way]
        found[way] = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        )
        print(way, json.dumps(found[way]))
    moments, stacked = found["moments"], found["stacked"]
    accumulation = max(0.0, moments["overhead"]) * moments["forward_s"]
    found["stacked_fit_over_closed_form"] = stacked["fit_s"] / moments["fit_s"]
    found["stacked_fit_over_closed_form_and_accumulation"] = stacked["fit_s"] / (moments["fit_s"] + accumulation)
    found["peak_stacked_over_moments"] = stacked["peak_bytes_above_model"] / moments["peak_bytes_above_model"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
