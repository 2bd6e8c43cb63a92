"""lm-eval's tasks through the pipeline against lm-eval's own loop: the same answers, likelihoods and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval
import pytest
from hydra import compose, initialize_config_dir
from lm_eval.tasks import TaskManager

import kvgauge
from kvgauge import artifacts, provenance
from kvgauge.artifacts import read_json, read_lines
from kvgauge.configuration import CONF_DIR
from kvgauge.evaluation.lm_eval_model import KVGaugeLM
from kvgauge.prompts.choices import of_text
from pipelines import evaluate, prepare

TASKS = ("say_colour", "choose_colour", "choose_thing", "last_word")
# Caches that can forget what follows them and caches that cannot, with and without a fit.
CELLS: dict[str, dict[str, Any]] = {
    "full": {},
    "ksvd": {"budget": 0.25},
    "kvslimmer": {"budget": 0.5},
    "streaming_llm": {"budget": 0.5},
    "quantized_cache": {},
}


@pytest.fixture(scope="module")
def folder(task_files: Path) -> Path:
    return task_files


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, folder: Path, moments, tiny) -> Path:
    root = tmp_path_factory.mktemp("artifacts")
    method, model = kvgauge.build_method("ksvd"), tiny("tiny/llama")
    fitted = method.fit(moments("tiny/llama"), model)
    assert fitted is not None
    directory = artifacts.begin(root / "fit" / "ksvd")
    fitted.save(directory / "projections.safetensors")
    tokenizer = kvgauge.load_tokenizer("tiny/llama")
    artifacts.finish(directory, "fit", provenance.fit_config(config(root, folder), model, tokenizer, method))
    prepare.prepare_prompts(config(root, folder), tokenizer)
    return root


def config(root: Path, folder: Path, *overrides: str):
    panel = ",".join(
        "{" + ", ".join([f"method: {name}", *(f"{key}: {value}" for key, value in fields.items())]) + "}"
        for name, fields in CELLS.items()
    )
    own = ["model=tiny/llama", "benchmark=lm_eval", f"benchmark.tasks=[{','.join(TASKS)}]", f"artifacts={root}"]
    own += [f"benchmark.include_path={folder}", f"panel=[{panel}]"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("config", [*own, *overrides])


@pytest.fixture(scope="module")
def pipeline(root: Path, folder: Path) -> Path:
    evaluate.run(config(root, folder))
    [directory] = (root / "evaluate").iterdir()
    return directory


def loop(root: Path, folder: Path, method: str) -> dict[str, Any]:
    fields = {("budget" if key == "budget" else f"method_{key}"): value for key, value in CELLS[method].items()}
    fitted = str(root / "fit" / "ksvd" / "projections.safetensors") if method == "ksvd" else None
    lm = KVGaugeLM("tiny/llama", method=method, fitted=fitted, batch_size=1, **fields)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(model=lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)


@pytest.mark.parametrize("method", list(CELLS))
def test_the_pipeline_says_what_lm_evals_loop_says(root: Path, folder: Path, pipeline: Path, method: str) -> None:
    found = loop(root, folder, method)
    rows = [row for row in read_lines(pipeline / "samples.jsonl") if row["method"] == method]
    assert len(rows) == 4 * len(TASKS)
    for task in TASKS:
        if task == "choose_thing" and method != "full":
            continue  # what requests share is compressed once here, and all but the last token of each there
        own = [row for row in rows if row["task"] == task]
        logged: dict[int, dict[str, Any]] = {}
        for sample in found["samples"][task]:
            logged.setdefault(sample["doc_id"], {})[sample["filter"]] = sample
        for number, row in enumerate(own):
            by_filter = logged[number]
            first = next(iter(by_filter.values()))
            if task == "say_colour":
                [[said]] = first["resps"]
                assert row["answer"].split("\n\n")[0].split("Question:")[0] == said
            else:
                likelihoods = [(float(value), bool(greedy)) for [(value, greedy)] in first["resps"]]
                assert [greedy for _, greedy in of_text(row["answer"])] == [greedy for _, greedy in likelihoods]
                values = [value for value, _ in of_text(row["answer"])]
                assert values == pytest.approx([value for value, _ in likelihoods], rel=1e-4)
            for key, value in row["details"].items():
                metric, name = key.split(",")
                assert value == pytest.approx(by_filter[name][metric], rel=1e-4)
        scored = {"say_colour": "exact_match,first-word"}.get(task, "acc,none")
        assert sum(row["score"] for row in own) / 4 == pytest.approx(found["results"][task][scored])
        assert {row["split"] for row in own} == {"the last 1 tokens are the question"}


def test_batches_leave_choices_alone(root: Path, folder: Path, pipeline: Path) -> None:
    evaluate.run(config(root, folder, "batch_size=3", "out=batches"))
    batched = {(row["cell"], row["sample_id"]): row for row in read_lines(root / "evaluate/batches/samples.jsonl")}
    for row in read_lines(pipeline / "samples.jsonl"):
        same = batched[row["cell"], row["sample_id"]]
        if row["task"] == "say_colour":
            assert same["nbytes"] > 0
        else:
            assert (same["answer"], same["nbytes"]) == (row["answer"], row["nbytes"])


def test_drafts_end_where_a_text_ends_the_answer(root: Path, folder: Path, pipeline: Path) -> None:
    evaluate.run(config(root, folder, "draft_tokens=8", "out=drafts"))
    drafted = {(row["cell"], row["sample_id"]): row for row in read_lines(root / "evaluate/drafts/samples.jsonl")}
    for row in read_lines(pipeline / "samples.jsonl"):
        same = drafted[row["cell"], row["sample_id"]]
        assert (same["score"], same["nbytes_end"]) == (row["score"], row["nbytes_end"])


def test_conversations_of_choices_are_refused(root: Path, folder: Path) -> None:
    with pytest.raises(kvgauge.UserError, match="set turns=1"):
        evaluate.run(config(root, folder, "turns=2"))


def test_cells_hold_every_task(pipeline: Path) -> None:
    cells = read_json(pipeline / "cells.json")
    assert {row["task"] for row in cells} == {*TASKS, "all"}
    assert all(0.0 <= row["mean"] <= 1.0 and row["low"] <= row["mean"] <= row["high"] for row in cells)
