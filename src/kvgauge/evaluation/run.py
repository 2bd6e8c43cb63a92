"""One run of the evaluation: from a configuration to result files."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgauge import artifacts, configuration, provenance
from kvgauge.architecture.prompt_length import prompt_length
from kvgauge.configuration import digest
from kvgauge.contract.benchmark import Benchmark, as_benchmark
from kvgauge.errors import UserError
from kvgauge.evaluation import estimate, sampling, scoring, statistics
from kvgauge.evaluation.answering import Answerer
from kvgauge.evaluation.cell import Cell
from kvgauge.evaluation.engine import Engine, missing, rows
from kvgauge.evaluation.panel import Setting, cells, settings
from kvgauge.evaluation.progress import Progress
from kvgauge.evaluation.sharding import Processes
from kvgauge.evaluation.store import AnswerStore
from kvgauge.evaluation.units import Encoder, Unit, make_units
from kvgauge.methods.exact.full import Full
from kvgauge.models.identity import weights_nbytes
from kvgauge.models.loading import load_model
from kvgauge.models.spec import ModelSpec
from kvgauge.prompts.samples import Sample, read_samples
from kvgauge.stage import EXIT_USER_ERROR, complete, stage_directory

BASELINE = "full"
ANY_LENGTH = 64  # tokens of a prompt, for models whose rotary frequencies depend on that


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
        benchmark: scores the answers.
        config: identity of the results.
        directory: where they go.
        store: where answers are kept.
        draft_tokens: the most tokens of a draft that are checked at once.
        temperature: of sampled answers; 0 answers greedily.
        seed: of sampled answers.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    samples: Sequence[Sample]
    units: Sequence[Unit]
    cells: Sequence[Cell]
    baseline: Cell | None
    benchmark: Benchmark
    config: dict[str, Any]
    directory: Path
    store: AnswerStore
    draft_tokens: int = 0
    temperature: float = 0.0
    seed: int = 0

    @property
    def all_cells(self) -> list[Cell]:
        """The cells to answer with, the baseline first."""
        return [*([self.baseline] if self.baseline else []), *self.cells]


def evaluate(cfg: DictConfig) -> Path | None:
    """Evaluate the cells of a configuration on its benchmark.

    Returns:
        The directory of the results; None in a dry run, and in all processes of a run but the leading one.

    Raises:
        UserError: bad input, or a stage that has to run first.
    """
    processes = Processes.of()
    try:
        plan = load_plan(cfg, processes)
    except UserError:
        if processes.local_rank == 0:
            raise
        sys.exit(EXIT_USER_ERROR)  # every process makes the same mistake; one of them says it
    if cfg.dry_run:
        if processes.leads:
            print(dry_run(plan, processes))
        return None
    if complete(plan.directory, plan.config):
        return plan.directory if processes.leads else None
    answer(plan, processes.share(plan.units), show=processes.leads)
    if not processes.leads:
        return None
    processes.wait(plan.units, plan.all_cells, plan.store, cfg.patience)
    write(plan, cfg)
    if not cfg.store:
        shutil.rmtree(plan.store.root)
    return plan.directory


def load_plan(cfg: DictConfig, processes: Processes) -> Plan:
    """Load the model and plan the run.

    Raises:
        UserError: bad input, or a stage that has to run first.
    """
    chosen = settings(cfg)
    benchmark = as_benchmark(configuration.build(cfg.benchmark, "benchmark"))
    spec: ModelSpec = configuration.build(cfg.model, "model")
    several = processes.size > 1 and spec.device == "auto" and spec.device_map is None and torch.cuda.is_available()
    device = f"cuda:{processes.local_rank % torch.cuda.device_count()}" if several else None
    model, tokenizer = load_model(spec, device=device)
    return make_plan(cfg, model, tokenizer, chosen, benchmark)


def dry_run(plan: Plan, processes: Processes) -> str:
    """What the run would do, as text."""
    known = estimate.states(plan.units, plan.all_cells, plan.store)
    if all(state.stored == state.total for state in known):
        return estimate.describe(known, None)
    speed = estimate.probe(plan.model)
    left = estimate.estimate(plan.model, plan.encoder, plan.units, plan.all_cells, plan.store, speed, processes.size)
    return estimate.describe(known, left)


def make_plan(
    cfg: DictConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chosen: Sequence[Setting],
    benchmark: Benchmark,
) -> Plan:
    """What a run will do.

    Raises:
        UserError: bad input, or a stage that has to run first.
    """
    prompts_config = provenance.prompts_config(cfg, tokenizer)
    prompts = artifacts.find(cfg.artifacts, "prompts", prompts_config, "kvgauge prepare")
    samples = read_samples(prompts)
    if cfg.turns < benchmark.least_turns:
        raise UserError(
            f"benchmark {benchmark.name} asks {benchmark.least_turns} questions in one conversation, and a later one "
            f"needs an earlier answer: set turns={benchmark.least_turns}"
        )
    if cfg.turns > 1:
        samples = benchmark.turns(samples, cfg.turns)
    drafted = draft_tokens(cfg)
    sampling.check(cfg.temperature, cfg.repeats, turns=cfg.turns, draft_tokens=drafted, samples=samples)
    samples = sampling.repeated(samples, cfg.repeats)
    # Both change the order of floating-point sums, and with it, once in a while, a token.
    more: dict[str, Any] = {"batch_size": cfg.batch_size} if cfg.batch_size > 1 else {}
    if drafted:
        more["draft_tokens"] = drafted
    if cfg.temperature:
        more |= {"temperature": cfg.temperature, "seed": cfg.seed}
    panel = cells(cfg, model, tokenizer, chosen, **more)
    baseline = None
    if cfg.baseline and all(cell.label != BASELINE for cell in panel):
        [baseline] = cells(cfg, model, tokenizer, [Setting(Full(), chosen[0].compress_at)], **more)
    for cell in panel:
        with prompt_length(model, ANY_LENGTH):
            cell.method.new_cache(model, cell.fitted)  # refuses a model that it does not serve before any work is done
    encoder = Encoder(model, tokenizer, benchmark.chat, benchmark.overlong)
    units = make_units(samples, encoder, cfg.batch_size, cfg.turns)
    config = {
        "cells": [cell.fingerprint for cell in panel],
        "baseline": baseline.fingerprint if baseline else None,
        "prompts": digest(prompts_config),
        "turns": cfg.turns,
        "seed": cfg.seed,
        **({"repeats": cfg.repeats} if cfg.repeats > 1 else {}),
        "code": provenance.benchmark_version(cfg, scoring.__name__, statistics.__name__),
    }
    label = panel[0].label if len(panel) == 1 else f"panel-{len(panel)}"
    directory = stage_directory(cfg, "evaluate", f"{cfg.model.name}-{benchmark.name}-{label}", config)
    # A store of the run's own lets processes meet there, and is gone afterwards.
    root = Path(cfg.artifacts) / "answers" if cfg.store else directory / ".answers"
    return Plan(
        model,
        tokenizer,
        encoder,
        samples,
        units,
        panel,
        baseline,
        benchmark,
        config,
        directory,
        AnswerStore(root),
        drafted,
        float(cfg.temperature),
        cfg.seed,
    )


def draft_tokens(cfg: DictConfig) -> int:
    """The most tokens of a draft that are checked at once.

    Raises:
        UserError: a number below 0, or drafts for batches or conversations.
    """
    tokens = int(cfg.draft_tokens)
    if tokens < 0:
        raise UserError(f"draft_tokens is {tokens}: set it to 0 (no drafts) or more")
    if tokens and (cfg.batch_size > 1 or cfg.turns > 1):
        raise UserError("drafts are for one prompt at a time: set draft_tokens=0, or batch_size=1 and turns=1")
    return tokens


def answer(plan: Plan, units: Sequence[Unit], show: bool = True) -> None:
    """Answer what is not stored yet."""
    todo = [sum(len(unit.samples) for unit in units if missing(unit, [cell], plan.store)) for cell in plan.all_cells]
    for cell in plan.all_cells:
        plan.store.describe(cell.fingerprint, cell.config)
    with Progress(plan.all_cells, todo, plan.benchmark, show) as progress:
        answerer = Answerer(plan.model, plan.tokenizer, plan.draft_tokens, plan.temperature, plan.seed)
        Engine(answerer, plan.encoder, plan.all_cells, plan.store, progress).run(units)


def write(plan: Plan, cfg: DictConfig) -> None:
    """Write the results of what is stored."""
    # Sampled answers are another model's to every table that compares: they never pair with greedy ones.
    name = f"{cfg.model.name}, temperature {plan.temperature:g}" if plan.temperature else cfg.model.name
    found = rows(plan.units, plan.samples, plan.all_cells, plan.store, name, plan.benchmark)
    weights = {"weights_nbytes": weights_nbytes(plan.model)}
    summary = [row | weights for row in statistics.summarise(found.samples, BASELINE, seed=cfg.seed)]
    averages = scoring.averages(plan.benchmark, summary)
    artifacts.begin(plan.directory)
    artifacts.write_lines(plan.directory / "samples.jsonl", _own(plan, found.samples))
    artifacts.write_lines(plan.directory / "timings.jsonl", _own(plan, found.timings))
    artifacts.write_json(plan.directory / "cells.json", _own(plan, summary))
    if averages is not None:
        artifacts.write_json(plan.directory / "averages.json", _own(plan, averages))
    artifacts.finish(
        plan.directory,
        "evaluate",
        plan.config,
        cells={cell.label: cell.config for cell in plan.cells},
        environment=provenance.environment(),
        samples=len(plan.samples),
        truncated_samples=len({row["sample_id"] for row in found.samples if row["truncated"]}),
    )


def _own(plan: Plan, found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the rows of a cell that only served as the baseline."""
    return [row for row in found if plan.baseline is None or row["cell"] != plan.baseline.label]
