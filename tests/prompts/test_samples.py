from __future__ import annotations

import json
from typing import Any

import pytest

from kvgauge.errors import UserError
from kvgauge.prompts.samples import Sample

ROW: dict[str, Any] = {
    "id": "a-8-0000",
    "task": "a",
    "context": "The sky is blue. ",
    "question": "What is blue?",
    "answer_prefix": "",
    "answers": ["the sky", "sky"],
    "max_new_tokens": 4,
    "length": 8,
}


@pytest.mark.parametrize(
    "more", [{}, {"tokens": 7}, {"chat": False}, {"language": "en", "bucket": None, "all_classes": ["a", "b"]}]
)
def test_a_sample_is_the_same_in_its_file(more: dict[str, Any]) -> None:
    sample = Sample.of(ROW | more)
    assert sample.to_dict() == ROW | more
    assert Sample.of(json.loads(json.dumps(sample.to_dict()))) == sample
    assert sample.facts == {key: value for key, value in more.items() if key not in ("tokens", "chat")}


def test_a_fact_cannot_take_the_place_of_an_attribute() -> None:
    sample = Sample(**ROW | {"answers": ("sky",), "facts": {"length": 3}})
    with pytest.raises(UserError, match="a fact called length"):
        sample.to_dict()


def test_a_row_that_lacks_something_is_refused() -> None:
    with pytest.raises(UserError, match="line 3 has no question, answers: run"):
        Sample.of({key: value for key, value in ROW.items() if key not in ("question", "answers")}, "line 3")
