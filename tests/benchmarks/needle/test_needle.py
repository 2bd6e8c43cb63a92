"""Where the needles stand, what is asked, and what is refused."""

from __future__ import annotations

import re

import pytest

import kvgauge
from kvgauge import configuration
from kvgauge.benchmarks.needle.needle import Needle
from kvgauge.prompts.length import TokenCounter

NEEDLE = re.compile(r"One of the special magic numbers for ([\w-]+) is: (\d+)\.")


@pytest.fixture(scope="module")
def counter():
    return TokenCounter(kvgauge.load_tokenizer("smollm2-135m"), chat=True)


def needle(**options) -> Needle:
    return configuration.build(configuration.read("benchmark", "needle"), "benchmark", **options)


@pytest.mark.parametrize("haystack", ["essay", "noise"])
def test_the_needle_stands_at_its_depth(haystack, counter):
    benchmark = needle(haystack=haystack, lengths=[900], depths=[0, 50, 100], samples=1)
    samples = list(benchmark.prompts(counter))
    assert len(samples) == benchmark.total == 3
    for sample in samples:
        [found] = NEEDLE.finditer(sample.context)
        assert found[2] in sample.answers and found[1] in sample.question
        opening = sample.context.index("\n")
        depth = (found.start() - opening) / (len(sample.context) - len(found[0]) - opening)
        assert depth == pytest.approx(sample.facts["depth"], abs=0.1)  # a share of sentences, not of characters
        assert counter(sample.context, sample.question, sample.answer_prefix) + 32 <= 900
    assert len({sample.id for sample in samples}) == 3
    assert [sample.task for sample in samples] == ["depth_000", "depth_050", "depth_100"]


def test_several_needles_are_all_asked_for(counter):
    benchmark = needle(needles=3, lengths=[1200], depths=[25], samples=1)
    [sample] = benchmark.prompts(counter)
    assert {found[2] for found in NEEDLE.finditer(sample.context)} == set(sample.answers)
    assert len(sample.answers) == 3
    assert benchmark.score(sample, f"They are {sample.answers[0]} and {sample.answers[2]}.") == pytest.approx(2 / 3)
    assert benchmark.score(sample, "none") == 0.0
    assert benchmark.kind(sample.task) == "retrieval"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": [0.5]}, "whole percents from 0 to 100|has to be a whole number"),
        ({"depths": [101]}, "whole percents from 0 to 100|has to be a whole number"),
        ({"depths": [5, 5]}, "give each of them once"),
        ({"lengths": []}, "give at least one"),
        ({"needles": 0}, "needles is 0"),
        ({"haystack": "hay"}, "unknown haystack of benchmark needle 'hay'"),
    ],
)
def test_bad_values_are_one_line(options, message):
    with pytest.raises(kvgauge.UserError, match=message) as refusal:
        needle(**options)
    assert "\n" not in str(refusal.value)
