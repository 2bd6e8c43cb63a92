"""The tasks against RULER's own configuration and templates, as the wheel carries them."""

import importlib.util
import runpy
from pathlib import Path

import pytest
import yaml

from kvgauge.benchmarks.ruler import TASKS, generate

OFFICIAL = Path(importlib.util.find_spec("long_context_eval").origin).parent
MARK = "<context>"


@pytest.fixture(scope="module")
def official_templates():
    return runpy.run_path(str(OFFICIAL / "data/synthetic/constants.py"))["TASKS"]


@pytest.fixture(scope="module")
def official_tasks():
    return yaml.safe_load((OFFICIAL / "synthetic.yaml").read_text(encoding="utf-8"))


def test_names_and_order_are_the_official_ones(official_tasks):
    assert list(TASKS) == list(official_tasks)


def test_answers_are_as_long_as_the_official_ones(official_tasks, official_templates):
    for name, spec in TASKS.items():
        assert spec.max_new_tokens == official_templates[official_tasks[name]["task"]]["tokens_to_generate"]


def test_categories_are_the_papers():
    assert [spec.category for spec in TASKS.values()] == [
        *["retrieval"] * 8, "tracing", "aggregation", "aggregation", "qa", "qa",
    ]  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_wording_is_the_official_template(task, official_tasks, official_templates, prompt_length, sources):
    official = official_tasks[task]
    template = official_templates[official["task"]]["template"]
    prefix = official_templates[official["task"]]["answer_prefix"]
    [sample] = generate(task, 1024, 1, 11, prompt_length, sources)
    words = {"context": MARK}
    if official["task"] == "niah":
        thing = official["args"]["type_needle_v"]
        if official["args"]["num_needle_q"] * official["args"]["num_needle_v"] == 1:
            thing = thing[:-1]
            for plural, singular in (("Some", "A"), ("are all", "is"), ("are", "is")):
                template, prefix = template.replace(plural, singular), prefix.replace(plural, singular)
        words |= {"type_needle_v": thing, "query": sample.question.split(" for ")[1].split(" mentioned")[0]}
    elif task == "vt":
        words |= {"query": sample.question.split("value ")[1].split()[0], "num_v": 5}
    elif task.startswith("qa"):
        words["query"] = sample.question.split("Question: ")[1]
    before, after = template.format(**words).split(MARK)
    prompt = sample.context + sample.question
    assert before in prompt
    assert prompt.endswith(after)
    assert sample.context[-1].isspace() and prefix[0].isspace()
    assert sample.answer_prefix == prefix.format(**words).strip()
    if task not in ("vt", "cwe"):  # those two begin with a solved example
        assert prompt.startswith(before)
