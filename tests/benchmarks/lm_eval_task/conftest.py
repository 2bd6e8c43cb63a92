"""Task files of our own with documents beside them, as lm-eval's `include_path` reads them: no network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

COLOURS = ("red", "blue", "green", "black")
MEAN = {"aggregation": "mean", "higher_is_better": True}
FILTERS = [
    {"name": "first-word", "filter": [{"function": "regex", "regex_pattern": r"(\w+)"}, {"function": "take_first"}]},
    {"name": "whole", "filter": [{"function": "take_first"}]},
]
TASKS = {
    "say_colour": {
        "output_type": "generate_until",
        "doc_to_text": "{{passage}}\nQuestion: what colour is the {{thing}}?\nAnswer:",
        "doc_to_target": "{{colour}}",
        "num_fewshot": 2,
        "fewshot_split": "train",
        "generation_kwargs": {"until": ["\n\n", "Question:"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "ignore_case": True, **MEAN}],
        "filter_list": FILTERS,
    },
    "say_context": {
        "output_type": "generate_until",
        "doc_to_text": "{{passage}}\nWhat colour is the {{thing}}?",
        "doc_to_target": "{{colour}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", **MEAN}],
        "metadata": {"version": 1, "context": "passage"},
    },
    "choose_colour": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{passage}}\nThe {{thing}} is",
        "doc_to_choice": list(COLOURS),
        "doc_to_target": "{{['red', 'blue', 'green', 'black'].index(colour)}}",
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
    },
    "choose_thing": {  # the requests of a document differ before the text that is scored, as in WinoGrande
        "output_type": "multiple_choice",
        "doc_to_text": "{{0 if colour == 'red' else 1}}",
        "doc_to_choice": "{{[passage + ' It is red, and so the sky', passage + ' It is not red, and so the grass']}}",
        "doc_to_target": "is as everybody sees",
        "metric_list": [{"metric": "acc", **MEAN}],
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{passage}}\nThe {{thing}} is",
        "doc_to_target": " {{colour}}",
        "metric_list": [
            {"metric": "acc", **MEAN},
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
    },
    "whole_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{passage}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "sampled": {
        "output_type": "generate_until",
        "doc_to_text": "{{passage}}",
        "doc_to_target": "{{colour}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": True, "temperature": 0.7},
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
    "voted": {
        "output_type": "generate_until",
        "doc_to_text": "{{passage}}",
        "doc_to_target": "{{colour}}",
        "repeats": 8,
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
}


def documents(count: int, first: int = 0) -> list[dict[str, str]]:
    rows = []
    for index in range(first, first + count):
        colour, thing = COLOURS[index % 4], f"box{index}"
        others = " ".join(f"The jar{n} is {COLOURS[(index + n) % 4]}." for n in range(6 + index % 3))
        rows.append({"passage": f"{others} The {thing} is {colour}. {others}", "thing": thing, "colour": colour})
    return rows


def write_tasks(folder: Path, count: int = 4) -> Path:
    for split, rows in {"test": documents(count), "train": documents(5, first=40)}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {split: str(folder / f"{split}.jsonl") for split in ("test", "train")}},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(json.dumps(common | task))  # JSON is YAML
    return folder


@pytest.fixture(scope="session")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))
