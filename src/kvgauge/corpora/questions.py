"""Questions over shared documents, as SQuAD 2.0 and HotpotQA have them, and how their rows are read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Evidence:
    """Characters ``[start, end)`` of document number `document` that the answer rests on."""

    document: int
    start: int
    end: int


@dataclass(frozen=True)
class Question:
    """One question over a `QuestionSet`.

    Attributes:
        query: the question's text.
        answers: accepted answers, each once.
        gold: the documents that hold the answer, as indices into `QuestionSet.documents`.
        related: documents of the same article (SQuAD) or retrieved with the gold ones (HotpotQA).
        evidence: the parts of the gold documents without which the question cannot be answered.
    """

    query: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...]
    evidence: tuple[Evidence, ...]


@dataclass(frozen=True)
class QuestionSet:
    """Questions and the documents they are asked of; documents are distinct and sorted."""

    documents: tuple[str, ...]
    questions: tuple[Question, ...]


def squad_rows(data: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of SQuAD's official nested file in the form the hub gives them: one per question."""
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = question["answers"]
                yield {
                    "title": article["title"],
                    "context": paragraph["context"],
                    "question": question["question"],
                    "answers": {
                        "text": [answer["text"] for answer in answers],
                        "answer_start": [answer["answer_start"] for answer in answers],
                    },
                }


def squad_questions(rows: Iterable[Mapping[str, Any]]) -> QuestionSet:
    """A `QuestionSet` of rows ``{title, context, question, answers: {text, answer_start}}``.

    Questions without an answer are left out; their paragraphs stay as documents.
    """
    rows = list(rows)
    documents = tuple(sorted({row["context"] for row in rows}))
    number = {text: index for index, text in enumerate(documents)}
    articles: dict[str, dict[int, None]] = defaultdict(dict)  # a dict keeps the paragraphs' order, each once
    for row in rows:
        articles[row["title"]][number[row["context"]]] = None
    questions = []
    for row in rows:
        texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
        if not texts:
            continue
        gold = number[row["context"]]
        questions.append(
            Question(
                query=row["question"],
                answers=tuple(dict.fromkeys(texts)),
                gold=(gold,),
                related=tuple(index for index in articles[row["title"]] if index != gold),
                evidence=(Evidence(gold, starts[0], starts[0] + len(texts[0])),),
            )
        )
    return QuestionSet(documents, tuple(questions))


def hotpotqa_questions(rows: Iterable[Mapping[str, Any]]) -> QuestionSet:
    """A `QuestionSet` of rows ``{question, answer, context: [(title, sentences)], supporting_facts: [(title, i)]}``.

    A document is its title, a newline, and its sentences. The titles of gold documents are evidence too.
    """
    rows = list(rows)
    documents = tuple(sorted({_document(title, sentences) for row in rows for title, sentences in row["context"]}))
    number = {text: index for index, text in enumerate(documents)}
    questions = []
    for row in rows:
        facts = {(title, sentence) for title, sentence in row["supporting_facts"]}
        titles = {title for title, _ in facts}
        gold, related, evidence = [], [], []
        for title, sentences in row["context"]:
            document = number[_document(title, sentences)]
            if title not in titles:
                related.append(document)
                continue
            gold.append(document)
            evidence.append(Evidence(document, 0, len(title)))
            start = len(title) + 1
            for index, sentence in enumerate(sentences):
                if (title, index) in facts:
                    evidence.append(Evidence(document, start, start + len(sentence)))
                start += len(sentence)
        questions.append(
            Question(
                query=row["question"],
                answers=(row["answer"],),
                gold=tuple(dict.fromkeys(gold)),
                related=tuple(dict.fromkeys(related)),
                evidence=tuple(evidence),
            )
        )
    return QuestionSet(documents, tuple(questions))


def hotpotqa_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the hub's HotpotQA, which keeps columns of lists, in the form of the official file."""
    context, facts = row["context"], row["supporting_facts"]
    return {
        "question": row["question"],
        "answer": row["answer"],
        "context": list(zip(context["title"], context["sentences"], strict=True)),
        "supporting_facts": list(zip(facts["title"], facts["sent_id"], strict=True)),
    }


def _document(title: str, sentences: Iterable[str]) -> str:
    return f"{title}\n{''.join(sentences)}"
