"""What the pipeline saves on lm-eval's tasks: a panel of six cells against six runs of lm-eval's own loop.

    python -m pipelines.studies.lm_eval_speed --model smollm2-135m --documents 4 --words 450

The tasks are written here, so that nothing is downloaded: short answers to a question about a long passage
(generation), and the same with four answers to choose from (likelihood). Both ways run in one process and meet the same
documents, prompts, filters and metrics by lm-eval's task objects, with the same fitted methods; loading the model and
fitting count for neither. The scores of both are compared. The last line is one JSON object: seconds both ways, their
ratio, and the scores.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgauge import configuration
from kvgauge.artifacts import write_lines
from kvgauge.benchmarks.lm_eval_task import LmEval
from kvgauge.calibration.collecting import collect
from kvgauge.contract.fitting import learns
from kvgauge.corpora.corpus import load_corpus
from kvgauge.evaluation.answering import Answerer
from kvgauge.evaluation.cell import Cell
from kvgauge.evaluation.engine import Engine, rows
from kvgauge.evaluation.lm_eval_model import KVGaugeLM
from kvgauge.evaluation.progress import Progress
from kvgauge.evaluation.store import AnswerStore
from kvgauge.evaluation.units import Encoder, make_units
from kvgauge.methods.registry import build_method
from kvgauge.models.loading import load_model
from kvgauge.prompts.length import TokenCounter

CELLS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("full", {}),
    ("ksvd", {"budget": 0.5}),
    ("kqsvd", {"budget": 0.5}),
    ("eigen", {"budget": 0.5}),
    ("kqsvd", {"budget": 0.25}),
    ("xkv", {"budget": 0.5}),
)
GENERATION, LIKELIHOOD = "speed_generation", "speed_likelihood"
METRICS = {GENERATION: "exact_match", LIKELIHOOD: "acc"}
COLOURS = ("red", "blue", "green", "black")
MEAN = {"aggregation": "mean", "higher_is_better": True}
TASKS: dict[str, dict[str, Any]] = {
    GENERATION: {
        "output_type": "generate_until",
        "doc_to_text": "{{passage}}\nWhat is the colour of the {{thing}}? The colour of the {{thing}} is",
        "doc_to_target": "{{colour}}",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "ignore_case": True, **MEAN}],
        "filter_list": [
            {"name": "word", "filter": [{"function": "regex", "regex_pattern": r"(\w+)"}, {"function": "take_first"}]}
        ],
    },
    LIKELIHOOD: {
        "output_type": "multiple_choice",
        "doc_to_text": "{{passage}}\nThe colour of the {{thing}} is",
        "doc_to_choice": [f"{colour}, as was said above." for colour in COLOURS],
        "doc_to_target": f"{{{{{list(COLOURS)}.index(colour)}}}}",
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
    },
}


def write_tasks(folder: Path, documents: int, words: int) -> None:
    """Two task files and their documents.

    Args:
        folder: where.
        documents: how many.
        words: of a passage, about.
    """
    made = []
    for number in range(documents):
        rng = random.Random(number)
        things = [f"box {index}" for index in range(words // 7)]
        colours = [rng.choice(COLOURS) for _ in things]
        facts = [f"The colour of {thing} is {colour}." for thing, colour in zip(things, colours, strict=True)]
        asked = rng.randrange(len(things))
        made.append({"passage": " ".join(facts), "thing": things[asked], "colour": colours[asked]})
    write_lines(folder / "documents.jsonl", made)
    for name, task in TASKS.items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(json.dumps(common | task), encoding="utf-8")  # JSON is YAML


def fitted_cells(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sequences: int) -> list[Cell]:
    """`CELLS`, those that learn fitted on essays."""
    corpus = configuration.build(configuration.read("corpus", "essays"), "corpus", num_sequences=sequences)
    moments = collect(model, load_corpus(corpus, tokenizer, "calibration").split(1))
    cells = []
    for name, fields in CELLS:
        method = build_method(name, **fields)
        fitted = method.fit(moments, model) if learns(method) else None
        cells.append(Cell(method, "context", fitted, {"cell": method.label}))
    return cells


def panel(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cells: Sequence[Cell], folder: Path, batch_size: int
) -> tuple[float, dict[str, dict[str, float]]]:
    """Seconds of the pipeline from lm-eval's task files to scores, and the mean of each cell and task."""
    start = time.perf_counter()
    benchmark = LmEval(tasks=list(TASKS), include_path=str(folder))
    samples = list(benchmark.prompts(TokenCounter(tokenizer, chat=False)))
    encoder = Encoder(model, tokenizer, chat=False)
    units = make_units(samples, encoder, batch_size)
    with tempfile.TemporaryDirectory() as scratch, Progress(cells, [0] * len(cells), benchmark, show=False) as silent:
        store = AnswerStore(Path(scratch))
        Engine(Answerer(model, tokenizer), encoder, cells, store, silent).run(units)
        found = rows(units, samples, cells, store, "model", benchmark).samples
    means: dict[str, dict[str, float]] = {cell.label: {} for cell in cells}
    for cell in cells:
        for task in TASKS:
            scores = [row["score"] for row in found if row["cell"] == cell.label and row["task"] == task]
            means[cell.label][task] = sum(scores) / len(scores)
    return time.perf_counter() - start, means


def loops(
    model_name: str, cells: Sequence[Cell], folder: Path, batch_size: int
) -> tuple[float, dict[str, dict[str, float]]]:
    """Seconds of lm-eval's loop for every cell from its task files to scores, and the mean of each cell and task."""
    seconds, means = 0.0, {}
    for cell, (name, fields) in zip(cells, CELLS, strict=False):
        with tempfile.TemporaryDirectory() as scratch:
            path = None
            if cell.fitted is not None:
                path = str(Path(scratch) / "projections.safetensors")
                cell.fitted.save(Path(path))
            lm = KVGaugeLM(model_name, method=name, fitted=path, batch_size=batch_size, **fields)
        start = time.perf_counter()
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        found = lm_eval.simple_evaluate(model=lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
        seconds += time.perf_counter() - start
        assert found is not None
        results: Any = found["results"]
        filters = {GENERATION: "word", LIKELIHOOD: "none"}
        means[cell.label] = {task: float(results[task][f"{METRICS[task]},{filters[task]}"]) for task in TASKS}
    return seconds, means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--documents", type=int, default=8, help="of each task")
    parser.add_argument("--words", type=int, default=450, help="of a passage")
    parser.add_argument("--batch-size", type=int, default=1, help="for both ways")
    parser.add_argument("--sequences", type=int, default=2, help="calibration sequences")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    cells = fitted_cells(model, tokenizer, options.sequences)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tasks(folder, options.documents, options.words)
        own_s, own = panel(model, tokenizer, cells, folder, options.batch_size)
        loop_s, loop = loops(options.model, cells, folder, options.batch_size)
    print(f"panel {own_s:.1f} s, lm-eval's loop {loop_s:.1f} s", file=sys.stderr)
    result = {
        "model": options.model,
        "documents": options.documents,
        "words": options.words,
        "batch_size": options.batch_size,
        "panel_s": round(own_s, 2),
        "loops_s": round(loop_s, 2),
        "ratio": round(loop_s / own_s, 2),
        "same_scores": own == loop,
        "scores": own,
        "loop_scores": loop,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
