"""One run of the evaluation: from a configuration to result files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvgauge
from kvgauge import artifacts, configuration, provenance
from kvgauge.configuration import digest
from kvgauge.evaluation import scoring, statistics
from kvgauge.evaluation.answering import Answerer
from kvgauge.evaluation.engine import Engine, missing, rows
from kvgauge.evaluation.panel import Cell, Setting, cells, settings
from kvgauge.evaluation.progress import Progress
from kvgauge.evaluation.samples import Sample, read_samples
from kvgauge.evaluation.store import AnswerStore
from kvgauge.evaluation.units import Encoder, Unit, make_units
from kvgauge.methods.full import Full
from kvgauge.stage import complete, stage_directory

BASELINE = "full"


@dataclass(frozen=True)
class Plan:
    """Everything that a run is about to do.

    Attributes:
        model, tokenizer: loaded.
        encoder: makes token ids of units.
        samples: in the order of the prompts artifact.
        units: what is run together.
        cells: whose rows are written.
        baseline: an uncompressed cell that only serves the paired differences; None where `cells` has one, or where no
            baseline is wanted.
        scorer: of the benchmark.
        config: identity of the results.
        directory: where they go.
        store: where answers are kept.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    samples: Sequence[Sample]
    units: Sequence[Unit]
    cells: Sequence[Cell]
    baseline: Cell | None
    scorer: scoring.Scorer
    config: dict[str, Any]
    directory: Path
    store: AnswerStore

    @property
    def all_cells(self) -> list[Cell]:
        """The cells to answer with, the baseline first."""
        return [*([self.baseline] if self.baseline else []), *self.cells]


def evaluate(cfg: DictConfig) -> None:
    """Evaluate the cells of a configuration on its benchmark, and print the directory of the results.

    Raises:
        UserError: bad input, or a stage that has to run first.
    """
    chosen = settings(cfg)
    scorer = scoring.scorer(cfg.benchmark.name)
    model, tokenizer = kvgauge.load_model(configuration.build(cfg.model, "model"))
    plan = make_plan(cfg, model, tokenizer, chosen, scorer)
    if complete(plan.directory, plan.config):
        return
    answer(plan, plan.units)
    write(plan, cfg)
    print(plan.directory)


def make_plan(
    cfg: DictConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chosen: Sequence[Setting],
    scorer: scoring.Scorer,
) -> Plan:
    """What a run will do.

    Raises:
        UserError: bad input, or a stage that has to run first.
    """
    prompts_config = provenance.prompts_config(cfg, tokenizer)
    prompts = artifacts.find(cfg.artifacts, "prompts", prompts_config, "python -m pipelines.prepare")
    samples = read_samples(prompts)
    more: dict[str, Any] = {"batch_size": cfg.batch_size} if cfg.batch_size > 1 else {}
    if cfg.turns:
        more["turns"] = True
    panel = cells(cfg, model, tokenizer, chosen, **more)
    baseline = None
    if cfg.baseline and all(cell.label != BASELINE for cell in panel):
        [baseline] = cells(cfg, model, tokenizer, [Setting(Full(), chosen[0].compress_at)], **more)
    encoder = Encoder(model, tokenizer, cfg.benchmark.get("chat"), scoring.limit(cfg.benchmark.name))
    units = make_units(samples, encoder, cfg.batch_size, cfg.turns)
    config = {
        "cells": [cell.fingerprint for cell in panel],
        "baseline": baseline.fingerprint if baseline else None,
        "prompts": digest(prompts_config),
        "seed": cfg.seed,
        "code": provenance.source_version(scoring, statistics),
    }
    label = panel[0].label if len(panel) == 1 else f"panel-{len(panel)}"
    directory = stage_directory(cfg, "evaluate", f"{cfg.model.name}-{cfg.benchmark.name}-{label}", config)
    # A store of the run's own lets processes meet there, and is gone afterwards.
    root = Path(cfg.artifacts) / "answers" if cfg.store else directory / ".answers"
    return Plan(
        model, tokenizer, encoder, samples, units, panel, baseline, scorer, config, directory, AnswerStore(root)
    )


def answer(plan: Plan, units: Sequence[Unit], show: bool = True) -> None:
    """Answer what is not stored yet."""
    todo = [sum(len(unit.samples) for unit in units if missing(unit, [cell], plan.store)) for cell in plan.all_cells]
    for cell in plan.all_cells:
        plan.store.describe(cell.fingerprint, cell.config)
    with Progress(plan.all_cells, todo, plan.scorer, show) as progress:
        Engine(Answerer(plan.model, plan.tokenizer), plan.encoder, plan.all_cells, plan.store, progress).run(units)


def write(plan: Plan, cfg: DictConfig) -> None:
    """Write the results of what is stored."""
    found = rows(plan.units, plan.samples, plan.all_cells, plan.store, cfg.model.name, plan.scorer)
    summary = statistics.summarise(found.samples, BASELINE, seed=cfg.seed)
    artifacts.begin(plan.directory)
    artifacts.write_lines(plan.directory / "samples.jsonl", _own(plan, found.samples))
    artifacts.write_lines(plan.directory / "timings.jsonl", _own(plan, found.timings))
    artifacts.write_json(plan.directory / "cells.json", _own(plan, summary))
    artifacts.finish(
        plan.directory,
        "evaluate",
        plan.config,
        cells={cell.label: cell.config for cell in plan.cells},
        environment=provenance.environment(),
        samples=len(plan.samples),
    )


def _own(plan: Plan, found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the rows of a cell that only served as the baseline."""
    return [row for row in found if plan.baseline is None or row["cell"] != plan.baseline.label]
