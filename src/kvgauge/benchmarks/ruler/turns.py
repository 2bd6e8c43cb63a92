"""Further questions about the context of a needle task.

RULER's needle tasks hide more needles than they ask for. The further turns of a conversation ask for the others, in
the task's own words.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace

from kvgauge.errors import UserError
from kvgauge.prompts.samples import Sample

_NEEDLE = re.compile(r"One of the special magic \w+ for ([\w-]+) is: ([\w-]+)\.")
_ASKED = re.compile(r" for ([\w-]+) mentioned in the provided text")


def needle_turns(sample: Sample, turns: int) -> list[Sample]:
    """A RULER needle sample and further ones with the same context, each asking for another needle.

    Which needles is drawn from the sample's id.

    Raises:
        UserError: the sample does not hide so many needles, or asks for several at once.
    """
    hidden: dict[str, list[str]] = {}
    for key, value in _NEEDLE.findall(sample.context):
        hidden.setdefault(key, []).append(value)
    asked = _ASKED.search(sample.question)
    if asked is None or asked.group(1) not in hidden or len(hidden) < turns:
        raise UserError(
            f"sample {sample.id} has no {turns} questions to one context: "
            f"use benchmark.tasks=[niah_multikey_1,niah_multikey_2,niah_multikey_3], or fewer turns"
        )
    first = asked.group(1)
    others = random.Random(sample.id).sample(sorted(set(hidden) - {first}), turns - 1)
    further = [
        replace(
            sample,
            id=f"{sample.id}-turn{number}",
            question=sample.question.replace(first, key),
            answer_prefix=sample.answer_prefix.replace(first, key),
            answers=tuple(hidden[key]),
        )
        for number, key in enumerate(others, start=2)
    ]
    return [sample, *further]
