"""A stand-in for InfiniteBench where its files cannot be had: rows of its schema, at any length.

    python -m kvgauge.benchmarks.infinitebench.stand_in artifacts/infinitebench_stand_in --words 1000 --samples 20
    python -m pipelines.prepare benchmark=infinitebench_stand_in

These are NOT InfiniteBench's rows, and figures of theirs are not InfiniteBench's, whose texts have 100,000 tokens and
more. What they share with it is the official wording of the prompts and the schema (arXiv 2402.13718): a number or a
sequence of digits in a lot of noise, a value in a JSON object, the largest or smallest number of a list, the value of
nested function calls, all of them drawn here; questions about a "book", which is the paragraphs of a SQuAD article,
with an answer of one's own or four to choose from.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from kvgauge.artifacts import write_lines
from kvgauge.benchmarks.infinitebench.tasks import TASKS
from kvgauge.benchmarks.longbench.stand_in import single_document
from kvgauge.benchmarks.ruler.haystack import NOISE
from kvgauge.benchmarks.stand_in_command import stand_in_command
from kvgauge.corpora.sources import Sources

Row = dict[str, Any]
JSON_WORDS, NUMBER_WORDS, FUNCTION_WORDS = 20, 2, 12  # roughly, in tokens, what an entry of each takes in words


def passkey(sources: Sources, words: int, number: int, rng: random.Random) -> Row:
    """Five digits, said twice, in noise."""
    key = str(rng.randrange(10_000, 100_000))
    return _hidden(
        f"The pass key is {key}. Remember it. {key} is the pass key.", "What is the pass key?", key, words, rng
    )


def number_string(sources: Sources, words: int, number: int, rng: random.Random) -> Row:
    """Ten digits, each of them several times over, in noise."""
    digits = "".join(digit * rng.randrange(1, 4) for digit in rng.choices("0123456789", k=4))[:10]
    hidden = f"The sequence of digits is {digits}. Remember it. {digits} is the sequence of digits."
    return _hidden(hidden, "What is the sequence of digits?", digits, words, rng)


def _hidden(hidden: str, asked: str, answer: str, words: int, rng: random.Random) -> Row:
    lines = [NOISE] * max(words // len(NOISE.split()), 1)
    lines.insert(rng.randrange(len(lines) + 1), hidden)
    return _row("\n".join(lines), asked, [answer])


def kv_retrieval(sources: Sources, words: int, number: int, rng: random.Random) -> Row:
    """A value of a JSON object of identifiers."""

    def name() -> str:
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    pairs = {name(): name() for _ in range(max(words // JSON_WORDS, 1))}
    key = rng.choice(sorted(pairs))
    asked = f'Key: "{key}"\nThe value associated with the specified key is: '
    return _row(f"JSON data:\n{json.dumps(pairs)}", asked, [pairs[key]])


def math_find(sources: Sources, words: int, number: int, rng: random.Random) -> Row:
    """The largest or the smallest number of a list."""
    numbers = [rng.randrange(1, 100) for _ in range(max(words // NUMBER_WORDS, 2))]
    wanted, answer = rng.choice([("largest number", max(numbers)), ("smallest number", min(numbers))])
    asked = f"You should answer with only one number, no other words. The {wanted} of the list is: "
    return _row(str(numbers), asked, [str(answer)])


def code_run(sources: Sources, words: int, number: int, rng: random.Random) -> Row:
    """The value of a function that calls one that calls one."""
    count = max(words // FUNCTION_WORDS, 3)
    added = [rng.randrange(1, 10) for _ in range(count)]
    calls: dict[int, int] = {}
    chain = rng.sample(range(count), 3)
    for one, other in pairwise(chain):
        calls[one] = other
    bodies = [f"func_{calls[index]}(x)" if index in calls else "x" for index in range(count)]
    functions = [f"def func_{index}(x):\n    return {bodies[index]} + {added[index]}" for index in range(count)]
    argument = rng.randrange(-9, 10)
    asked = f"Please give me the exact number of the return value of func_{chain[0]}({argument})."
    return _row("\n\n".join(functions), asked, [str(argument + sum(added[index] for index in chain))])


def longbook_qa_eng(sources: Sources, words: int, number: int, rng: random.Random) -> Row:
    """A question about the paragraphs of a SQuAD article."""
    data = sources.squad
    question = data.questions[random.Random("longbook").sample(range(len(data.questions)), number + 1)[number]]
    made = single_document(data, question, words, rng)
    return _row(made["context"], question.query, list(question.answers))


def longbook_choice_eng(sources: Sources, words: int, number: int, rng: random.Random) -> Row:
    """The same with four answers to choose from, three of them to other questions."""
    row = longbook_qa_eng(sources, words, number, rng)
    right = row["answer"][0]
    taken = {answer.lower() for answer in row["answer"]}
    others = (question.answers[0] for question in rng.sample(sources.squad.questions, 50))
    wrong = list({answer.lower(): answer for answer in others if answer.lower() not in taken}.values())[:3]
    options = [right, *wrong]
    rng.shuffle(options)
    return row | {"answer": [right], "options": options}


MAKERS: dict[str, Callable[[Sources, int, int, random.Random], Row]] = {
    "passkey": passkey,
    "number_string": number_string,
    "kv_retrieval": kv_retrieval,
    "longbook_qa_eng": longbook_qa_eng,
    "longbook_choice_eng": longbook_choice_eng,
    "code_run": code_run,
    "math_find": math_find,
}


def rows(sources: Sources, task: str, words: int, samples: int, seed: int = 42) -> Iterator[Row]:
    """Rows of one task; more samples add to those there are.

    Args:
        sources: the texts.
        task: one of `MAKERS`.
        words: of a row, about.
        samples: how many rows.
        seed: of the draw.
    """
    for number in range(samples):
        yield MAKERS[task](sources, words, number, random.Random(f"{seed}/{task}/{number}")) | {"id": number}


def _row(context: str, asked: str, answers: list[str]) -> Row:
    return {"context": context, "input": asked, "answer": answers, "options": []}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a JSON Lines file per task."""
    stand_in_command(__doc__, _write, 1000, 20, arguments)


def _write(directory: Path, sources: Sources, words: int, samples: int, seed: int) -> None:
    for task in MAKERS:
        write_lines(directory / f"{TASKS[task].file}.jsonl", list(rows(sources, task, words, samples, seed)))


if __name__ == "__main__":
    main()
