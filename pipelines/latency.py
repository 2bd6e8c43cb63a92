"""latency: how fast the cells prefill and decode, and what memory they take.

    kvgauge latency method=kqsvd latency.context_lengths=[1024,2048] latency.batch_sizes=[1,8]

Writes ``latency/…/latency.json``, a row per cell, batch size and context length. Points are kept as they finish, and a
run that was broken off goes on with the next one. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from kvgauge import artifacts, configuration, provenance
from kvgauge.architecture.facts import model_facts
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.fitting import fit_command, learns
from kvgauge.contract.identity import config, method_version, target
from kvgauge.contract.method import Method
from kvgauge.contract.while_decoding import cell_label
from kvgauge.evaluation.panel import settings
from kvgauge.fingerprint import code_version
from kvgauge.measure import latency, memory
from kvgauge.measure.latency import LatencyConfig
from kvgauge.models.identity import model_fingerprint
from kvgauge.models.loading import load_model
from kvgauge.stage import complete, stage, stage_directory
from kvgauge.tracking import track


def run(cfg: DictConfig) -> None:
    grid: LatencyConfig = configuration.build(cfg.latency, "latency")
    methods = grid.methods([setting.method for setting in settings(cfg)])
    model, tokenizer = load_model(configuration.build(cfg.model, "model"))
    limit = grid.memory_limit or memory.available_nbytes(model.device)
    memory.refuse_beyond(
        {
            f"batch {batch} at {length} tokens": memory.point_nbytes(
                model_facts(model),
                model.config.get_text_config().intermediate_size,
                batch,
                length,
                grid.all_steps,
                grid.prefill_chunk,
            )
            for batch, length in grid.points
        },
        limit,
    )
    fits = {cell_label(method): _projections(cfg, model, tokenizer, method) for method in methods if learns(method)}
    identity = {
        "model": model_fingerprint(model),
        "dtype": str(model.dtype),
        "cells": [[config(method), method_version(method)] for method in methods],
        "fits": {label: artifacts.read_json(path / artifacts.META)["fingerprint"] for label, path in fits.items()},
        "latency": configuration.plain(cfg.latency),
        "code": code_version(latency.__name__),
    }
    label = "+".join(cell_label(method) for method in methods) if len(methods) < 3 else f"{len(methods)}-cells"
    directory = stage_directory(cfg, "latency", f"{cfg.model.name}-{label or latency.STATIC}", identity)
    if not complete(directory, identity):
        artifacts.begin(directory)
        contenders = latency.baselines(model)
        for method in methods:
            fit = fits.get(cell_label(method))
            fitted = None if fit is None else Fitted.load(fit / "projections.safetensors")
            contenders.append(latency.contender(model, method, fitted))
        rows: list[dict[str, Any]] = []
        with tqdm(total=len(grid.points), desc="latency", unit="point") as bar:
            for batch, length in grid.points:
                kept = directory / "points" / f"{batch}x{length}-{configuration.digest(identity)}.json"
                if not kept.is_file():
                    point = latency.measure_point(model, contenders, grid, batch, length, bar.set_postfix_str)
                    for row in point:
                        row["model"] = cfg.model.name
                        if grid.peak:
                            job = _job(cfg, grid, methods, fits, row)
                            row |= vars(memory.peak_of(job))
                    artifacts.write_json(kept, point)
                rows += artifacts.read_json(kept)
                bar.update()
        artifacts.write_json(directory / "latency.json", rows)
        artifacts.finish(
            directory,
            "latency",
            identity,
            temporary=["points"],
            environment=dict(provenance.environment()),
            threads=torch.get_num_threads(),
            thread_wait_policy=os.environ.get("OMP_WAIT_POLICY", "default"),
            device=str(model.device),
        )
    track(cfg, directory)
    rows = artifacts.read_json(directory / "latency.json")
    shown = (
        "cell",
        "batch",
        "context_length",
        "ttft_s",
        "tpot_median_s",
        "tpot_over_static",
        "tpot_over_dynamic",
        "tpot_over_one_pass",
        "attention_of_bound",
        "mbu",
    )
    print(json.dumps({"directory": str(directory), "rows": [{key: row[key] for key in shown} for row in rows]}))


def _projections(cfg: DictConfig, model: Any, tokenizer: Any, method: Method) -> Path:
    """The directory of a method's fit."""
    wanted = provenance.fit_config(cfg, model, tokenizer, method)
    return artifacts.find(Path(cfg.artifacts), "fit", wanted, fit_command(method))


def _job(
    cfg: DictConfig, grid: LatencyConfig, methods: list[Method], fits: dict[str, Path], row: dict[str, Any]
) -> dict[str, Any]:
    """What `memory.peak_of` measures for a row."""
    by_label = {cell_label(method): method for method in methods}
    node: dict[str, Any] | None = None
    if row["cell"] in by_label:
        method = by_label[row["cell"]]
        node = target(method)
    return {
        "model": configuration.plain(cfg.model),
        "cell": row["cell"],
        "method": node,
        "projections": str(fits[row["cell"]] / "projections.safetensors") if row["cell"] in fits else None,
        "latency": {key: value for key, value in configuration.plain(cfg.latency).items() if key != "_target_"},
        "batch": row["batch"],
        "context_length": row["context_length"],
    }


if __name__ == "__main__":
    stage(run)()
