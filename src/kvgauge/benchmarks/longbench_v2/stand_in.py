"""A stand-in for LongBench v2 where its file cannot be had: rows of its schema over SQuAD and HotpotQA.

    python -m kvgauge.benchmarks.longbench_v2.stand_in artifacts/longbench_v2_stand_in --words 1000 --samples 40
    python -m pipelines.prepare benchmark=longbench_v2_stand_in

These are NOT LongBench v2's rows, and figures of theirs are not LongBench v2's. What they share with it is the prompt's
official wording and the schema (arXiv 2412.15204): a question over one text (SQuAD) or over several (HotpotQA) with
four answers to choose from, three of which belong to other questions. "easy" are questions whose wrong answers stand
nowhere in the text, "hard" those whose wrong answers belong to the same article. All lengths are "short".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kvgauge.artifacts import write_json
from kvgauge.benchmarks.longbench.stand_in import several_documents, single_document
from kvgauge.benchmarks.longbench_v2.rows import FILE, LETTERS
from kvgauge.benchmarks.stand_in_command import stand_in_command
from kvgauge.corpora.questions import Question, QuestionSet
from kvgauge.corpora.sources import Sources
from kvgauge.errors import UserError

Maker = Callable[[QuestionSet, Question, int, random.Random], dict[str, Any]]
DOMAINS: dict[str, tuple[str, Maker]] = {
    "Single-Document QA": ("squad", single_document),
    "Multi-Document QA": ("hotpotqa", several_documents),
}


def rows(sources: Sources, words: int, samples: int, seed: int = 42) -> Iterator[dict[str, Any]]:
    """Rows of every domain, half of them easy; more samples add to those there are.

    Args:
        sources: the texts.
        words: of a row's context, about.
        samples: rows of each domain.
        seed: of the draw.
    """
    for domain, (name, make) in DOMAINS.items():
        data: QuestionSet = getattr(sources, name)
        if samples > len(data.questions):
            raise UserError(f"there are {len(data.questions)} questions of {name}: set --samples to that or fewer")
        order = random.Random(f"{seed}/{domain}").sample(range(len(data.questions)), len(data.questions))
        for number, index in enumerate(order[:samples]):
            rng = random.Random(f"{seed}/{domain}/{number}")
            question, difficulty = data.questions[index], ("easy", "hard")[number % 2]
            made = make(data, question, words, rng)
            choices = [question.answers[0], *_wrong(data, question, difficulty == "hard", made["context"], rng)]
            rng.shuffle(choices)
            yield {
                "_id": f"stand-in-{name}-{number:04d}",
                "domain": domain,
                "sub_domain": "stand-in",
                "difficulty": difficulty,
                "length": "short",
                "question": question.query,
                **{f"choice_{letter}": text for letter, text in zip(LETTERS, choices, strict=True)},
                "answer": LETTERS[choices.index(question.answers[0])],
                "context": made["context"],
            }


def _wrong(data: QuestionSet, question: Question, near: bool, context: str, rng: random.Random) -> list[str]:
    """Three answers to other questions: `near` ones of documents that belong to the same article, others of a text
    that holds them nowhere."""
    taken = {answer.lower() for answer in question.answers}
    around = {*question.gold, *question.related}
    found: list[str] = []
    shuffled = rng.sample(data.questions, len(data.questions))
    if near:  # those of the article first; where it has too few, any
        shuffled.sort(key=lambda other: not around & set(other.gold))
    for other in shuffled:
        answer = other.answers[0]
        if answer.lower() in taken or (not near and answer.lower() in context.lower()):
            continue
        taken.add(answer.lower())
        found.append(answer)
        if len(found) == len(LETTERS) - 1:
            break
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Write ``data.json``."""
    stand_in_command(__doc__, _write, 1000, 40, arguments)


def _write(directory: Path, sources: Sources, words: int, samples: int, seed: int) -> None:
    write_json(directory / FILE, list(rows(sources, words, samples, seed)))


if __name__ == "__main__":
    main()
