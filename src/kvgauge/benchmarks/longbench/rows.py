"""The official rows: JSON Lines files in a directory, in ``data.zip``, or in the hub's copy of it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvgauge.benchmarks.longbench.datasets import Edition, dataset_of
from kvgauge.corpora.official import hub_file
from kvgauge.errors import UserError

HUB_DATASET = "THUDM/LongBench"
HUB_FILE = "data.zip"
OFFICIAL = f"get {HUB_FILE} of the hub's dataset {HUB_DATASET} and set benchmark.source to it or to its directory"
ADVICE: dict[Edition, str] = {
    "standard": OFFICIAL,
    "e": OFFICIAL,
    "stand_in": "make them with python -m kvgauge.benchmarks.longbench.stand_in <directory> and set benchmark.source "
    "to that directory",
}


@dataclass(frozen=True)
class Row:
    """One row of an official file.

    Attributes:
        input: the question, or whatever is asked of the context; may be empty.
        context: the long text.
        answers: the references; any one is enough.
        words: the file's own ``length``: words, or characters of Chinese, of the row's texts.
        language: the file's own: ``en``, ``zh``, or a programming language.
        all_classes: the classes of a classification dataset, else None.
        source_id: the file's own ``_id``.
    """

    input: str
    context: str
    answers: tuple[str, ...]
    words: int
    language: str
    all_classes: tuple[str, ...] | None
    source_id: str


class Files:
    """The official files of a source.

    Args:
        source: ``hub``, a directory or a zip file, see `LongBench`.
        tasks: the tasks that will be read, each a file's name without ``.jsonl``.
        advice: how to come by the files, for error messages.

    Raises:
        UserError: the source does not exist or cannot be reached, or lacks files (the message lists which).
    """

    def __init__(self, source: str, tasks: Sequence[str], advice: str = OFFICIAL) -> None:
        self._advice = advice
        self._root = _root(source, advice)
        missing = [f"{task}.jsonl" for task in tasks if not self._path(task).is_file()]
        if missing:
            raise UserError(f"LongBench files are missing in {source}: {', '.join(missing)}: {advice}")

    def rows(self, task: str) -> list[Row]:
        """The rows of a task, in the file's order.

        Raises:
            UserError: the file is empty, or a line is not an official row.
        """
        with self._path(task).open("rb") as stream:
            rows = list(_rows(stream, task, self._advice))
        if not rows:
            raise UserError(f"LongBench file {task}.jsonl has no rows: {self._advice}")
        return rows

    def _path(self, task: str) -> Path | zipfile.Path:
        name = f"{task}.jsonl"
        nested = self._root / "data" / name
        return nested if nested.is_file() else self._root / name


def _root(source: str, advice: str) -> Path | zipfile.Path:
    path = hub_file(HUB_DATASET, HUB_FILE, OFFICIAL) if source == "hub" else Path(source)
    if path.is_dir():
        return path
    if not path.is_file():
        raise UserError(f"no LongBench source {source!r}: {advice}")
    try:
        return zipfile.Path(path)
    except zipfile.BadZipFile as error:
        raise UserError(f"LongBench source {source} is neither a directory nor a zip file: {advice}") from error


def _rows(lines: Any, task: str, advice: str) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield _row(json.loads(line), classes=dataset_of(task).metric == "classification")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"line {number} of LongBench file {task}.jsonl is not an official row ({error!r}): {advice}"
            ) from error


def _row(data: Mapping[str, Any], classes: bool) -> Row:
    answers = data["answers"]
    if not isinstance(answers, list) or not answers:
        raise ValueError("answers is not a list of references")
    if classes and not data["all_classes"]:
        raise ValueError("all_classes is empty")
    return Row(
        input=str(data["input"]),
        context=str(data["context"]),
        answers=tuple(str(answer) for answer in answers),
        words=int(data["length"]),
        language=str(data["language"]),
        all_classes=tuple(str(name) for name in data["all_classes"]) if data.get("all_classes") else None,
        source_id=str(data["_id"]),
    )
