"""Conversations: their facts, what is asked of them, and the way through the pipeline."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import kvgauge
from kvgauge import configuration
from kvgauge.artifacts import read_lines
from kvgauge.benchmarks.multi_turn import MultiTurn
from kvgauge.configuration import CONF_DIR
from kvgauge.errors import UserError
from kvgauge.prompts.length import TokenCounter
from kvgauge.prompts.samples import Sample
from pipelines import evaluate, prepare


def build(**options) -> MultiTurn:
    return configuration.build(configuration.read("benchmark", "multi_turn"), "benchmark", **options)


@pytest.fixture(scope="module")
def counter() -> TokenCounter:
    return TokenCounter(kvgauge.load_tokenizer("smollm2-135m"), chat=True)


@pytest.mark.parametrize("haystack", ["essay", "noise"])
def test_every_answer_stands_in_the_context_they_share(counter, haystack):
    of = build(haystack=haystack, lengths=[900], samples=2, questions=4)
    samples = list(of.prompts(counter))
    assert len(samples) == of.total == 8 and len({sample.id for sample in samples}) == 8
    for start in (0, 4):
        talk = samples[start : start + 4]
        assert len({sample.context for sample in talk}) == 1
        assert [sample.task for sample in talk] == ["first", "further", "further", "follow_up"]
        keepers = dict(re.findall(r"The keeper of the ([\w-]+) house is (\w+)\.", talk[0].context))
        numbers = dict(re.findall(r"The number of (\w+) is (\d+)\.", talk[0].context))
        assert len(keepers) == len(numbers) == 4
        for sample in talk[:-1]:
            [house] = re.findall(r"keeper of the ([\w-]+) house", sample.question)
            assert sample.answers == (keepers[house],)
        assert talk[-1].answers == (numbers[talk[0].answers[0]],)
        assert not [name for name in keepers.values() if name in talk[-1].question + talk[-1].answer_prefix]
        tokens = sum(counter("", sample.question, sample.answer_prefix) + 24 for sample in talk[1:])
        assert counter(talk[0].context, talk[0].question, talk[0].answer_prefix) + 24 + tokens <= 900 + 40
        assert Sample.of(talk[0].to_dict()) == talk[0]


def test_the_same_conversations_every_time_and_more_add_to_them(counter):
    few = list(build(lengths=[600], samples=1).prompts(counter))
    assert list(build(lengths=[600], samples=2).prompts(counter))[:3] == few


def test_answers_are_words(counter):
    of = build(lengths=[600], samples=1)
    first, *_, last = of.prompts(counter)
    assert of.score(first, f" {first.answers[0].upper()}.") == 1.0 and of.score(first, f"{first.answers[0]}x") == 0.0
    assert of.score(last, f"Ada, is {last.answers[0]}") == 1.0 and of.score(last, "") == 0.0
    assert [of.kind(sample.task) for sample in (first, last)] == ["retrieval", "reasoning"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"questions": 1}, "questions is 1: set it from 2"),
        ({"haystack": "hay"}, "unknown haystack"),
        ({"lengths": []}, "at least one"),
        ({"samples": 0}, "samples is 0"),
    ],
)
def test_bad_values_are_one_line(options, message):
    with pytest.raises(UserError, match=message):
        build(**options)


def test_through_the_pipeline_every_conversation_is_one_prefill(tmp_path: Path):
    def config(*more: str):
        own = ["model=tiny/llama", "benchmark=multi_turn", "benchmark.samples=2", "benchmark.lengths=[1800]"]
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return compose("config", [*own, "benchmark.haystack=noise", f"artifacts={tmp_path}", *more])

    prepare.prepare_prompts(config(), kvgauge.load_tokenizer("tiny/llama"))
    with pytest.raises(UserError, match=r"asks 3 questions in one conversation.*set turns=3"):
        evaluate.run(config("panel=[{method: full}]"))
    evaluate.run(config("panel=[{method: full},{method: streaming_llm, budget: 0.5}]", "turns=3"))
    [directory] = (tmp_path / "evaluate").iterdir()
    rows = read_lines(directory / "samples.jsonl")
    assert len(rows) == 2 * 2 * 3
    for cell in ("full", "streaming_llm@0.5"):
        talk = [row for row in rows if row["cell"] == cell][:3]
        assert [row["task"] for row in talk] == ["first", "further", "follow_up"]
        assert len({row["nbytes"] for row in talk}) == 1  # compressed once
