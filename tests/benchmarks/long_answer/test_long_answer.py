"""Long answers: drawn from their seeds, right by construction, and scored line by line."""

from __future__ import annotations

import random
import re

import pytest

import kvgauge
from kvgauge import configuration
from kvgauge.benchmarks.long_answer import LongAnswer
from kvgauge.benchmarks.long_answer.tasks import TASKS, numbered
from kvgauge.errors import UserError
from kvgauge.prompts.length import TokenCounter
from kvgauge.prompts.samples import Sample


@pytest.fixture(scope="module")
def counter() -> TokenCounter:
    return TokenCounter(kvgauge.load_tokenizer("smollm2-135m"), chat=False)


def build(**options) -> LongAnswer:
    return configuration.build(configuration.read("benchmark", "long_answer"), "benchmark", **options)


def right_answer(sample: Sample) -> str:
    return numbered(sample.answers, 301).removeprefix("301.")


def test_an_answer_has_as_many_lines_as_fit(counter):
    for sample in (samples := list(build(lengths=[128, 700], samples=1).prompts(counter))):
        tokens = len(counter.tokenizer(numbered(sample.answers, 301)).input_ids)
        assert sample.length - 20 < tokens <= sample.length and sample.max_new_tokens == tokens + 16
        assert Sample.of(sample.to_dict()) == sample
        assert sample.stop == ("\n\n",) and sample.chat is False
        assert sample.context.count("\n\n") == 2 and sample.question.endswith(":\n301.")
    assert len({sample.id for sample in samples}) == 8 == build(lengths=[128, 700], samples=1).total


def test_the_same_samples_every_time_and_more_add_to_them(counter):
    few = list(build(lengths=[128], tasks=["chain"], samples=2).prompts(counter))
    assert list(build(lengths=[128], tasks=["chain"], samples=3).prompts(counter))[:2] == few
    assert few[0].context != few[1].context


def test_every_text_has_numbers_of_its_own(counter):
    for sample in build(lengths=[200], samples=1).prompts(counter):
        starts = re.findall(r"(?:\A|\n\n).*:\n(\d+)\. ", sample.context)
        assert starts == ["101", "201", "301"]


@pytest.mark.parametrize("name", list(TASKS))
def test_fewer_lines_are_the_first_of_more(name):
    draw = TASKS[name].draw
    short, long = draw(random.Random("s"), 7), draw(random.Random("s"), 30)
    assert long.text[:7] == short.text and long.answer[:7] == short.answer
    assert len(long.text) == len(long.answer) == 30


def test_answers_follow_from_their_texts():
    lines = TASKS["transform"].draw(random.Random(1), 20)
    assert all(two == f"one {one}" for one, two in zip(lines.text, lines.answer, strict=True))
    words = [word for line in lines.text for word in line.split(" ", 1)]
    assert len(set(words)) == len(words) == 40
    lines = TASKS["tally"].draw(random.Random(1), 60)
    for place, line in enumerate(lines.answer):
        word, count = line.split()
        assert word == lines.text[place] and int(count) == lines.text[: place + 1].count(word)
    lines = TASKS["chain"].draw(random.Random(1), 60)
    value = int(lines.text[0].removeprefix("start with "))
    for said, line in zip(lines.text[1:], lines.answer[1:], strict=True):
        word, step = said.split()
        before, value = value, value + (int(step) if word == "add" else -int(step))
        assert line == f"{said}: {before} {'+' if word == 'add' else '-'} {step} = {value}" and 0 <= value <= 20


@pytest.mark.parametrize("name", list(TASKS))
def test_every_line_counts(counter, name):
    of = build(lengths=[200], tasks=[name], samples=1)
    [sample] = of.prompts(counter)
    answer, lines = right_answer(sample), len(sample.answers)
    assert of.score(sample, answer) == 1.0 and of.score(sample, "") == 0.0
    assert of.details(sample, answer) == {"unbroken": 1.0, "all": 1.0, "lines": lines}
    assert of.score(sample, answer.upper().replace(" ", "  ")) == 1.0
    assert of.score(sample, answer + "\n\nList:\n301. other") == 1.0  # what follows the end is not read
    cut = "\n".join(answer.split("\n")[:5])
    assert of.score(sample, cut) == pytest.approx(5 / lines)
    wrong = answer.replace(f"\n303. {sample.answers[2]}\n", "\n303. nothing\n")
    assert of.score(sample, wrong) == pytest.approx((lines - 1) / lines)
    assert of.details(sample, wrong) == {"unbroken": pytest.approx(2 / lines), "all": 0.0, "lines": lines}
    twice = answer + "\n302. nothing"
    assert of.score(sample, twice) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["recit"]}, "did you mean 'recite'"),
        ({"lengths": [4]}, "lengths of 16 tokens or more"),
        ({"lengths": []}, "at least one task"),
        ({"samples": 0}, "samples is 0"),
        ({"examples": -1}, "examples is -1"),
    ],
)
def test_bad_values_are_one_line(options, message):
    with pytest.raises(UserError, match=message) as refusal:
        build(**options)
    assert "\n" not in str(refusal.value)
