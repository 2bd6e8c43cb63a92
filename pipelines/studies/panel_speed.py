"""What sharing the prefill saves: the cells of a panel together against the same cells one after another, in one run.

    python -m pipelines.studies.panel_speed --model smollm2-135m --samples 20 --length 2048

Both ways answer the same prompts with the same fitted methods in one process, so loading and fitting count for neither.
The answers are compared. The last line is one JSON object: seconds both ways, their ratio, and the shares of prefill,
compression and decoding.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgauge import configuration
from kvgauge.benchmarks.ruler import Ruler
from kvgauge.calibration.collecting import collect
from kvgauge.corpora.corpus import load_corpus
from kvgauge.evaluation.answering import Answerer
from kvgauge.evaluation.cell import Cell
from kvgauge.evaluation.engine import Engine
from kvgauge.evaluation.progress import Progress
from kvgauge.evaluation.store import AnswerStore
from kvgauge.evaluation.units import Encoder, Unit, make_units
from kvgauge.methods.registry import build_method
from kvgauge.models.loading import load_model
from kvgauge.prompts.length import TokenCounter
from kvgauge.prompts.samples import Sample

METHODS = ("ksvd", "eigen", "kqsvd")
BUDGETS = (0.75, 0.5, 0.25)
PHASES = ("prefill", "compress", "question", "decode")


def fitted_cells(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sequences: int) -> list[Cell]:
    """The uncompressed cell and three methods at three budgets, fitted on essays."""
    corpus = configuration.build(configuration.read("corpus", "essays"), "corpus", num_sequences=sequences)
    moments = collect(model, load_corpus(corpus, tokenizer, "calibration").split(1))
    cells = [Cell(build_method("full"), "context", None, {"cell": "full"})]
    for name in METHODS:
        fitted = build_method(name).fit(moments, model)
        methods = [build_method(name, budget=budget) for budget in BUDGETS]
        cells += [Cell(method, "context", fitted, {"cell": method.label}) for method in methods]
    return cells


def compare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], cells: Sequence[Cell]
) -> dict[str, Any]:
    """Run the cells together and one by one; seconds, shares of the phases, and whether the answers are the same."""
    encoder, answerer = Encoder(model, tokenizer, chat=None), Answerer(model, tokenizer)
    units = make_units(samples, encoder)
    with tempfile.TemporaryDirectory() as scratch:
        warm_up = AnswerStore(Path(scratch) / "warm-up")
        _run(answerer, encoder, cells, warm_up, units[:1])
        together, apart = AnswerStore(Path(scratch) / "together"), AnswerStore(Path(scratch) / "apart")
        panel = separate = 0.0
        # Unit by unit in turns, so that both ways meet the same weather on the machine.
        for unit in units:
            panel += _run(answerer, encoder, cells, together, [unit])
            separate += sum(_run(answerer, encoder, [cell], apart, [unit]) for cell in cells)
        records = [
            [store.get(cell.fingerprint, key) or {} for unit in units for key in unit.keys for cell in cells]
            for store in (together, apart)
        ]
    same = [
        first["text"] == second["text"] and first["nbytes"] == second["nbytes"]
        for first, second in zip(*records, strict=True)
    ]
    shares = {"panel": _shares(records[0], len(cells)), "separate": _shares(records[1], 1)}
    return {
        "cells": [cell.label for cell in cells],
        "samples": len(samples),
        "panel_s": round(panel, 3),
        "separate_s": round(separate, 3),
        "ratio": round(separate / panel, 3),
        "identical_answers": sum(same),
        "answers": len(same),
        "shares": shares,
    }


def _run(
    answerer: Answerer, encoder: Encoder, cells: Sequence[Cell], store: AnswerStore, units: Sequence[Unit]
) -> float:
    with Progress(cells, [0] * len(cells), Ruler(), show=False) as silent:
        start = time.perf_counter()
        Engine(answerer, encoder, cells, store, silent).run(units)
        return time.perf_counter() - start


def _shares(records: Sequence[dict[str, Any]], sharing: int) -> dict[str, float]:
    """Shares of the phases; a prefill is counted once for the cells that share it."""
    seconds = {
        phase: sum(record["seconds"][phase] for record in records) / (sharing if phase == "prefill" else 1)
        for phase in PHASES
    }
    total = sum(seconds.values())
    return {phase: round(value / total, 4) for phase, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a prompt")
    parser.add_argument("--samples", type=int, default=20, help="prompts in all")
    parser.add_argument("--tasks", nargs="+", default=["niah_single_2", "niah_multikey_1", "vt", "qa_1"])
    parser.add_argument("--sequences", type=int, default=4, help="calibration sequences")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    each = -(-options.samples // len(options.tasks))
    ruler = Ruler(tasks=options.tasks, lengths=(options.length,), samples=each)
    prompts = list(ruler.prompts(TokenCounter(tokenizer, chat=True)))[: options.samples]
    cells = fitted_cells(model, tokenizer, options.sequences)
    result = compare(model, tokenizer, prompts, cells)
    print(f"panel {result['panel_s']} s, separate {result['separate_s']} s", file=sys.stderr)
    print(json.dumps({"model": options.model, "length": options.length, **result}))


if __name__ == "__main__":
    main()
