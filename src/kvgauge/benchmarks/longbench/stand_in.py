"""A stand-in for LongBench where its files cannot be had: rows of its schema over the texts that RULER is made of.

    python -m kvgauge.benchmarks.longbench.stand_in artifacts/longbench_stand_in --words 1150 --samples 50
    kvgauge prepare benchmark=longbench_stand_in

These are NOT LongBench's rows, and figures of theirs are not LongBench's: the questions are SQuAD's and HotpotQA's.
What they share with it is the kind of the prompt (its official wording and schema, arXiv 2308.14508, section 3.1):

- ``multifieldqa_en``: a question about one long text, here the paragraphs of a SQuAD article;
- ``hotpotqa``: a question over several passages, two of which hold the answer;
- ``trec``: few-shot classification of questions, here SQuAD's, by what is asked for;
- ``triviaqa``: few-shot reading, examples of passage, question and answer, the last one unanswered; here SQuAD's.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kvgauge.artifacts import write_lines
from kvgauge.benchmarks.stand_in_command import stand_in_command
from kvgauge.corpora.questions import Question, QuestionSet
from kvgauge.corpora.sources import Sources
from kvgauge.errors import UserError

Row = dict[str, Any]
Item = TypeVar("Item")

PATIENCE = 8  # texts in a row that do not fit before a row counts as full

# What a question asks for, by its first words; a question that begins otherwise is not used.
QUESTION_TYPES = {
    "Person": re.compile(r"who(se|m)?\b", re.IGNORECASE),
    "Date": re.compile(r"when\b|(in )?what year\b", re.IGNORECASE),
    "Place": re.compile(r"where\b|(in )?what (city|country)\b", re.IGNORECASE),
    "Number": re.compile(r"how (many|much)\b", re.IGNORECASE),
    "Reason": re.compile(r"why\b", re.IGNORECASE),
}


def single_document(data: QuestionSet, question: Question, words: int, rng: random.Random) -> Row:
    """A question about the paragraphs of its article, in random order, as many whole ones as fit besides its own."""
    [gold] = question.gold
    others = rng.sample(question.related, len(question.related))
    chosen = [gold, *_fitting(data, others, words - _words(data.documents[gold]))]
    rng.shuffle(chosen)
    return _row("\n".join(data.documents[index] for index in chosen), question.query, question.answers)


def several_documents(data: QuestionSet, question: Question, words: int, rng: random.Random) -> Row:
    """A question over numbered passages: those that answer it, those retrieved with them, then any others."""
    left = words - sum(_words(data.documents[index]) for index in question.gold)
    near = {*question.gold, *question.related}
    drawn = rng.sample(range(len(data.documents)), min(len(data.documents), words))  # every document has a word
    others = [index for index in drawn if index not in near]
    chosen = [*question.gold, *_fitting(data, [*question.related, *others], left)]
    rng.shuffle(chosen)
    passages = (f"Passage {number}:\n{data.documents[index]}" for number, index in enumerate(chosen, start=1))
    return _row("\n\n".join(passages), question.query, question.answers)


def few_shot_reading(data: QuestionSet, question: Question, words: int, rng: random.Random) -> Row:
    """Answered questions on other passages, and the question with its own."""
    asked = f"Passage:\n{data.documents[question.gold[0]]}\nQuestion:\n{question.query}\nAnswer:"
    examples = (
        f"Passage:\n{data.documents[other.gold[0]]}\nQuestion:\n{other.query}\nAnswer:\n{other.answers[0]}"
        for other in rng.sample(data.questions, len(data.questions))
        if other.gold != question.gold
    )
    return _row("\n\n".join(_whole(examples, words - _words(asked))), asked, question.answers)


def few_shot_classification(data: QuestionSet, question: Question, words: int, rng: random.Random) -> Row:
    """Questions with their types, and the question without."""
    asked = f"Question: {question.query}\nType:"
    examples = (
        f"Question: {other.query}\nType: {kind}"
        for other in rng.sample(data.questions, len(data.questions))
        if other.query != question.query and (kind := question_type(other.query))
    )
    row = _row("\n".join(_whole(examples, words - _words(asked))), asked, (question_type(question.query),))
    return row | {"all_classes": list(QUESTION_TYPES)}


def question_type(query: str) -> str:
    """The one of `QUESTION_TYPES` that a question asks for, or nothing."""
    return next((kind for kind, pattern in QUESTION_TYPES.items() if pattern.match(query)), "")


def rows(sources: Sources, task: str, words: int, samples: int, seed: int = 42) -> Iterator[Row]:
    """Rows of one dataset; more samples add to those there are.

    Args:
        sources: the texts.
        task: one of `MAKERS`.
        words: of a row's context and input, at most, unless the passages that answer the question are longer.
        samples: how many rows.
        seed: of the draw.

    Raises:
        UserError: more samples than there are questions.
    """
    data = sources.hotpotqa if task == "hotpotqa" else sources.squad
    questions = [question for question in data.questions if task != "trec" or question_type(question.query)]
    if samples > len(questions):
        raise UserError(f"there are {len(questions)} questions for {task}: set --samples to that or fewer")
    order = random.Random(f"{seed}/{task}").sample(range(len(questions)), len(questions))
    for number, index in enumerate(order[:samples]):
        made = MAKERS[task](data, questions[index], words, random.Random(f"{seed}/{task}/{number}"))
        yield made | {"dataset": task, "_id": f"stand-in-{number:04d}"}


MAKERS: dict[str, Callable[[QuestionSet, Question, int, random.Random], Row]] = {
    "multifieldqa_en": single_document,
    "hotpotqa": several_documents,
    "trec": few_shot_classification,
    "triviaqa": few_shot_reading,
}


def _fitting(data: QuestionSet, documents: Iterable[int], words: int) -> list[int]:
    """Documents that together have no more than `words` words."""
    return list(_within(documents, lambda index: _words(data.documents[index]), words))


def _whole(texts: Iterable[str], words: int) -> list[str]:
    """Texts that together have no more than `words` words."""
    return list(_within(texts, _words, words))


def _within(items: Iterable[Item], size: Callable[[Item], int], words: int) -> Iterator[Item]:
    """Items in their order, without those that are too long for what is left, until several in a row are."""
    refused = 0
    for item in items:
        if size(item) > words:
            refused += 1
            if refused == PATIENCE:
                return
            continue
        refused = 0
        words -= size(item)
        yield item


def _row(context: str, asked: str, answers: Sequence[str]) -> Row:
    return {
        "input": asked,
        "context": context,
        "answers": list(answers),
        "length": _words(context) + _words(asked),
        "language": "en",
        "all_classes": None,
    }


def _words(text: str) -> int:
    return len(text.split())


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a JSON Lines file per dataset."""
    stand_in_command(__doc__, _write, 1150, 50, arguments)


def _write(directory: Path, sources: Sources, words: int, samples: int, seed: int) -> None:
    for task in MAKERS:
        write_lines(directory / f"{task}.jsonl", list(rows(sources, task, words, samples, seed)))


if __name__ == "__main__":
    main()
