from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from kvgauge.benchmarks.ruler import Ruler, generate
from kvgauge.benchmarks.ruler.turns import needle_turns
from kvgauge.corpora.sources import Sources
from kvgauge.errors import UserError
from kvgauge.prompts.length import PromptLength
from kvgauge.prompts.samples import Sample

SampleMaker = Callable[[int], list[Sample]]


@pytest.fixture(scope="module")
def make_samples(prompt_length: PromptLength, sources: Sources) -> SampleMaker:
    """Samples that hide four needles and ask for one."""
    return lambda count: list(generate("niah_multikey_1", 600, count, 3, prompt_length, sources))


def test_every_turn_asks_for_another_needle(make_samples: SampleMaker) -> None:
    [sample] = make_samples(1)
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


def test_a_conversation_follows_the_other(make_samples: SampleMaker) -> None:
    first, second = samples = make_samples(2)
    assert Ruler().turns(samples, 1) == samples
    assert Ruler().turns(samples, 3) == [*needle_turns(first, 3), *needle_turns(second, 3)]


def test_too_few_needles_are_refused(make_samples: SampleMaker) -> None:
    with pytest.raises(UserError, match="niah_multikey_1"):
        Ruler().turns(make_samples(1), 5)
    [sample] = make_samples(1)
    with pytest.raises(UserError, match="one context"):
        needle_turns(replace(sample, question="Which words are the most frequent?"), 2)
