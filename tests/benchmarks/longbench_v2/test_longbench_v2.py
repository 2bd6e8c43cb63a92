"""LongBench v2: its schema on rows made here, its prompt, the reading of answers, its averages, and the stand-in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import kvgauge
from kvgauge import configuration
from kvgauge.benchmarks.longbench_v2 import LongBenchV2
from kvgauge.benchmarks.longbench_v2.longbench_v2 import said
from kvgauge.benchmarks.longbench_v2.rows import read
from kvgauge.benchmarks.longbench_v2.stand_in import main
from kvgauge.contract.benchmark import AVERAGE_KEYS
from kvgauge.errors import UserError
from kvgauge.prompts.length import TokenCounter
from kvgauge.prompts.samples import Sample


def row(number: int, **changes) -> dict:
    known = {
        "_id": f"id{number}",
        "domain": ("Single-Document QA", "Code Repository Understanding")[number % 2],
        "sub_domain": "Academic",
        "difficulty": ("easy", "hard")[number // 2 % 2],
        "length": ("short", "medium", "long")[number % 3],
        "question": f" Who wrote chapter {number}?",
        "choice_A": "Ann",
        "choice_B": "Bob ",
        "choice_C": "Cleo",
        "choice_D": "Dan",
        "answer": "ABCD"[number % 4],
        "context": f"Chapter {number} is by someone. " * 60,
    }
    return known | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data.json").write_text(json.dumps([row(number) for number in range(12)]))
    return tmp_path


@pytest.fixture(scope="module")
def counter() -> TokenCounter:
    return TokenCounter(kvgauge.load_tokenizer("smollm2-135m"), chat=True)


def build(source: Path, name: str = "longbench_v2", **options) -> LongBenchV2:
    return configuration.build(configuration.read("benchmark", name), "benchmark", source=str(source), **options)


def test_rows_become_the_official_prompt(folder, counter):
    samples = list(build(folder).prompts(counter))
    assert len(samples) == 12 and len({sample.id for sample in samples}) == 12
    first = samples[0]
    assert first.task == "single_document_qa_easy" and first.length == 32_000 and first.answers == ("A",)
    assert first.context.startswith(
        "Please read the following text and answer the question below.\n\n<text>\nChapter 0"
    )
    assert first.question == (
        "\n</text>\n\nWhat is the correct answer to this question: Who wrote chapter 0?\nChoices:\n"
        "(A) Ann\n(B) Bob\n(C) Cleo\n(D) Dan\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    assert first.max_new_tokens == 128 and Sample.of(first.to_dict()) == first
    assert samples[3].task == "code_repository_understanding_hard"


def test_more_samples_add_to_those_there_are_and_long_texts_lose_their_middle(folder, counter):
    few = {sample.id for sample in build(folder, samples=3).prompts(counter)}
    assert few < {sample.id for sample in build(folder, samples=6).prompts(counter)} and len(few) == 3
    for sample in build(folder, samples=2, max_length=400).prompts(counter):
        assert sample.facts["truncated"] and sample.tokens <= 400
        assert sample.context.startswith("Please read") and sample.question.endswith('answer here)".')
    assert build(folder).overlong == "truncate"


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The correct answer is (C).", "C"),
        ("**The correct answer is (B)**", "B"),
        ("I think so. The correct answer is D", "D"),
        ("The correct answer is (E)", None),
        ("C", None),
        ("", None),
    ],
)
def test_answers_are_read_as_officially(folder, counter, answer, letter):
    assert said(answer) == letter
    of = build(folder)
    for sample in of.prompts(counter):
        assert of.score(sample, answer) == float(letter == sample.answers[0])


def test_a_question_weighs_the_same_in_every_average(folder):
    setting = {"cell": "full", "method": "full", "budget": None, "compress_at": "context", "model": "m"}
    cells = [
        setting | {"task": "a_b_easy", "length": 32_000, "n": 3, "mean": 1.0},
        setting | {"task": "a_b_hard", "length": 32_000, "n": 1, "mean": 0.0},
        setting | {"task": "c_easy", "length": 256_000, "n": 4, "mean": 0.25},
        setting | {"task": "c_easy", "length": None, "n": 4, "mean": 0.25},
        setting | {"task": "all", "length": 32_000, "n": 4, "mean": 0.5},
    ]
    rows = build(folder).averages(cells)
    assert all(key in row for row in rows for key in AVERAGE_KEYS)
    assert {row["average"]: row["mean"] for row in rows} == {
        "overall": 0.5,
        "easy": pytest.approx(4 / 7),
        "hard": 0.0,
        "short": 0.75,
        "long": 0.25,
    }


def test_missing_and_damaged_files_are_one_line(tmp_path, counter):
    with pytest.raises(UserError, match=r"no directory '.*none' with LongBench v2 files"):
        list(build(tmp_path / "none").prompts(counter))
    with pytest.raises(UserError, match=r"missing in .*: data\.json: get data\.json of the hub"):
        list(build(tmp_path).prompts(counter))
    for content, message in (
        ("{", "is damaged"),
        ("{}", "it is no list of objects"),
        ("[]", "has no rows"),
        (json.dumps([row(0), row(1, answer="E")]), r"row 2 .* is not an official row .*answer 'E'"),
        (json.dumps([row(0, context=7)]), r"row 1 .*context is no text"),
        (json.dumps([{"_id": "a"}]), r"row 1 .*KeyError\('answer'\)"),
    ):
        (tmp_path / "data.json").write_text(content)
        with pytest.raises(UserError, match=message) as refusal:
            list(build(tmp_path).prompts(counter))
        assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="samples is 0"):
        build(tmp_path, samples=0)


def test_the_hub_out_of_reach_is_one_line(monkeypatch, counter):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"cannot get data\.json of THUDM/LongBench-v2 from the hub"):
        list(build("hub").prompts(counter))


def test_the_stand_in_has_the_schema_and_says_what_it_is(tmp_path, counter):
    main([str(tmp_path), "--words", "200", "--samples", "6"])
    rows = read(str(tmp_path))
    assert len(rows) == 12 and {row.domain for row in rows} == {"single_document_qa", "multi_document_qa"}
    for entry in rows:
        right = entry.choices["ABCD".index(entry.answer)]
        assert len({choice.lower() for choice in entry.choices}) == 4
        if entry.difficulty == "easy":
            assert not [text for text in entry.choices if text != right and text.lower() in entry.context.lower()]
    again = tmp_path / "again"
    main([str(again), "--words", "200", "--samples", "4"])
    assert read(str(again))[:4] == rows[:4]  # more samples add to those there are
    samples = list(build(tmp_path, "longbench_v2_stand_in").prompts(counter))
    assert all(sample.task.endswith("_stand_in") for sample in samples)
    with pytest.raises(UserError, match=r"longbench_v2\.stand_in"):
        list(build(tmp_path / "none", "longbench_v2_stand_in").prompts(counter))
