from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from kvgauge.evaluation.turns import needle_turns, with_turns

from kvgauge.errors import UserError
from kvgauge.prompts.samples import Sample

SampleMaker = Callable[..., list[Sample]]


def test_every_turn_asks_for_another_needle(make_samples: SampleMaker) -> None:
    [sample] = make_samples(1, keys=4)
    turns = needle_turns(sample, 4)
    assert turns[0] == sample
    assert len({turn.question for turn in turns}) == len({turn.answers for turn in turns}) == 4
    for turn in turns:
        [answer] = turn.answers
        key = turn.question.removeprefix("What is the special magic number for ").split()[0]
        assert f"for {key} is: {answer}." in turn.context
        assert f"for {key} mentioned" in turn.answer_prefix
    assert [turn.id for turn in turns[1:]] == [f"{sample.id}-turn{number}" for number in (2, 3, 4)]
    assert needle_turns(sample, 4) == turns


def test_one_turn_and_other_benchmarks_stay_as_they_are(make_samples: SampleMaker) -> None:
    samples = make_samples(2)
    assert with_turns("ruler", samples, 1) == samples
    assert with_turns("longbench", samples, 3) == samples


def test_too_few_needles_are_refused(make_samples: SampleMaker) -> None:
    with pytest.raises(UserError, match="niah_multikey_1"):
        with_turns("ruler", make_samples(1, keys=2), 3)
    [sample] = make_samples(1)
    with pytest.raises(UserError, match="one context"):
        needle_turns(replace(sample, question="Which words are the most frequent?"), 2)
    with pytest.raises(UserError, match="1 or more"):
        with_turns("ruler", [sample], 0)
