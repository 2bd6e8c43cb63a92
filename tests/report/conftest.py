"""Stage outputs as the stages write them, made of seeded random numbers with the shape of real ones."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvgauge.evaluation.statistics import summarise

Row = dict[str, Any]

SKILL = {"kqsvd": 0.95, "ksvd": 0.8, "eigen": 0.7, "xkv": 1.0, "kvslimmer": 0.5, "streamingllm": 0.35}
KIND = {
    "niah_single_1": "retrieval",
    "niah_multikey_1": "retrieval",
    "vt": "aggregation",
    "cwe": "aggregation",
    "qa_1": "qa",
}
EASE = {"niah_single_1": 1.0, "niah_multikey_1": 0.9, "vt": 0.7, "cwe": 0.5, "qa_1": 0.6}


def _generator(*names: object) -> np.random.Generator:
    """The same stream for the same names, whatever else is made."""
    return np.random.default_rng(zlib.crc32(repr(names).encode()))


def _samples(methods: tuple[str, ...], budgets: tuple[float, ...], lengths: tuple[int, ...], n: int) -> list[Row]:
    rows: list[Row] = []
    for method, budget in [("full", None), *((method, budget) for method in methods for budget in budgets)]:
        for length in lengths:
            full = length * 23_040
            kept = full if budget is None else int(full * budget * (0.97 + 0.03 * SKILL[method]))
            for task, ease in EASE.items():
                chance = ease if budget is None else ease * (1 - (1 - budget) ** 2 * (1.15 - SKILL[method]) * 1.4)
                draws = _generator(method, budget, length, task).random(n)
                for index, draw in enumerate(draws):
                    rows.append(
                        {
                            "cell": method if budget is None else f"{method}@{budget:g}",
                            "method": method,
                            "budget": budget,
                            "compress_at": "context",
                            "model": "smollm2-135m",
                            "sample_id": f"{task}-{length}-{index:04d}",
                            "task": task,
                            "kind": KIND[task],
                            "length": length,
                            "answer": "x",
                            "answers": ["x"],
                            "score": float(draw < chance),
                            "nbytes": kept,
                            "full_nbytes": full,
                            "nbytes_by_part": {"keys": kept // 2, "values": kept - kept // 2 - 9_000, "tail": 9_000},
                            "fixed_nbytes": 0 if budget is None else int(3e6 * budget),
                            "context_tokens": length - 64,
                            "compressed_tokens": 0 if budget is None else length - 64,
                            "seconds": {"prefill": 1.0, "compress": 0.1, "decode": 0.5},
                        }
                    )
    return rows


QUANTITIES = ("K", "Q", "V", "KQ", "VO", "softmax", "output")


def _fidelity(
    methods: tuple[str, ...], budgets: tuple[float, ...], quantities: tuple[str, ...] = QUANTITIES
) -> tuple[list[Row], list[Row]]:
    errors: list[Row] = []
    predictions: list[Row] = []
    for method in methods:
        for budget in budgets:
            head = {"method": method, "budget": budget, "rank_k": int(64 * budget), "rank_v": int(64 * budget)}
            for sequence in range(2):
                noise = _generator(method, budget, sequence)
                for place, quantity in enumerate(quantities):
                    for layer in range(12):
                        error = (1 - budget) * (1.4 - SKILL[method]) * 0.3 * (1 + 0.1 * place + 0.04 * layer)
                        error *= float(noise.uniform(0.8, 1.2))
                        errors.append(
                            head | {"layer": layer, "quantity": quantity, "error": error, "sequence": sequence}
                        )
                divergence = float((1 - budget) ** 3 * (1.4 - SKILL[method]) * noise.uniform(0.8, 1.2))
                full = 1024 * 23_040
                predictions.append(
                    head
                    | {
                        "sequence": sequence,
                        "kl": divergence,
                        "perplexity": 12.0 * float(np.exp(divergence)),
                        "perplexity_full": 12.0,
                        "nbytes": int(full * budget),
                        "full_nbytes": full,
                        "nbytes_by_part": {"keys": int(full * budget)},
                    }
                )
    return errors, predictions


def _latency(methods: tuple[str, ...], budgets: tuple[float, ...], lengths: tuple[int, ...]) -> list[Row]:
    rows: list[Row] = []
    for method, budget in [("full", None), *((method, budget) for method in methods for budget in budgets)]:
        for length in lengths:
            share = 1.0 if budget is None else budget
            per_token = 0.02 + 2e-6 * length * share * (1.0 if budget is None else 1.6 - SKILL[method] / 2)
            rows.append(
                {
                    "cell": method if budget is None else f"{method}@{budget:g}",
                    "method": method,
                    "budget": budget,
                    "batch": 1,
                    "context_length": length,
                    "ttft_s": 9e-4 * length * (1.0 if budget is None else 1.1),
                    "tpot_median_s": per_token,
                    "tpot_p95_s": per_token * 1.2,
                    "tokens_per_s": 1 / per_token,
                    "nbytes": int(length * 23_040 * share),
                    "peak_bytes": 600_000_000 + int(length * 46_080 * share),
                    "tpot_over_static": per_token / (0.02 + 2e-6 * length),
                    "tpot_over_dynamic": per_token / (0.021 + 2e-6 * length),
                    "ttft_over_static": 1.0 if budget is None else 1.1,
                }
            )
    return rows


@pytest.fixture(scope="session")
def write_evaluate() -> Callable[[Path, list[Row]], Path]:
    """Writes samples and their cells as the evaluate stage does, and returns the directory."""

    def write(directory: Path, samples: list[Row]) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in samples)
        (directory / "samples.jsonl").write_text(lines)
        (directory / "cells.json").write_text(json.dumps(summarise(samples, resamples=50)))
        return directory

    return write


@pytest.fixture(scope="session")
def make_samples() -> Callable[..., list[Row]]:
    """Rows of samples for methods, budgets, lengths and a number of samples per task."""
    return _samples


@pytest.fixture(scope="session")
def write_stages(write_evaluate: Callable[[Path, list[Row]], Path]) -> Callable[[Path], dict[str, list[Path]]]:
    """Writes a small output directory of each stage below a directory."""

    def write(root: Path) -> dict[str, list[Path]]:
        methods, budgets = ("kqsvd", "streamingllm"), (0.5, 0.25)
        evaluate = write_evaluate(root / "evaluate", _samples(methods, budgets, (1024,), 6))
        merge, latency = root / "merge", root / "latency"
        merge.mkdir()
        latency.mkdir()
        errors, predictions = _fidelity(methods, budgets, ("K", "V"))
        (merge / "fidelity.json").write_text(json.dumps(errors))
        (merge / "model.json").write_text(json.dumps(predictions))
        (latency / "latency.json").write_text(json.dumps(_latency(methods, budgets, (1024, 4096))))
        return {"evaluate_dirs": [evaluate], "merge_dirs": [merge], "latency_dirs": [latency]}

    return write


@pytest.fixture
def stages(tmp_path: Path, write_stages: Callable[[Path], dict[str, list[Path]]]) -> dict[str, list[Path]]:
    """A small output directory of each stage."""
    return write_stages(tmp_path)
