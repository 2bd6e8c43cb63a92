"""Files of a dataset as its authors publish them: from the hub, or from a directory that holds them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvgauge.errors import UserError


@dataclass(frozen=True)
class OfficialFiles:
    """The files of a dataset of the hub.

    Attributes:
        what: the benchmark's name, for error messages.
        dataset: its id on the hub.
        source: ``hub``, or a directory.
        advice: how to come by the files, for error messages.
    """

    what: str
    dataset: str
    source: str
    advice: str

    def find(self, names: Sequence[str]) -> dict[str, Path]:
        """The files `names`, wherever they are.

        Raises:
            UserError: there is no such directory, or it lacks files (the message lists which), or the hub cannot be
                reached.
        """
        if self.source == "hub":
            return {name: hub_file(self.dataset, name, self.advice) for name in names}
        folder = Path(self.source)
        if not folder.is_dir():
            raise UserError(f"no directory {self.source!r} with {self.what} files: {self.advice}")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{self.what} files are missing in {self.source}: {', '.join(missing)}: {self.advice}")
        return {name: folder / name for name in names}

    def rows(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of a JSON list or of JSON Lines, numbered from 1.

        Raises:
            UserError: the file is damaged, or holds something else.
        """
        text = path.read_text(encoding="utf-8")
        try:
            if path.suffix == ".json":
                found = json.loads(text)
            else:
                found = [json.loads(line) for line in text.splitlines() if line.strip()]
            if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
                raise ValueError("it is no list of objects")
        except ValueError as error:
            raise UserError(f"{self.what} file {path.name} is damaged ({error}): {self.advice}") from error
        if not found:
            raise UserError(f"{self.what} file {path.name} has no rows: {self.advice}")
        yield from enumerate(found, start=1)

    def bad_row(self, path: Path, number: int, error: Exception) -> UserError:
        """What to say of a row that is not as its authors publish it."""
        return UserError(
            f"row {number} of {self.what} file {path.name} is not an official row ({error!r}): {self.advice}"
        )


def hub_file(dataset: str, name: str, advice: str) -> Path:
    """A file of a dataset of the hub, downloaded once.

    Raises:
        UserError: the hub cannot be reached, or has no such file.
    """
    from huggingface_hub import hf_hub_download  # a slow import that a local source does not need

    try:
        return Path(hf_hub_download(dataset, name, repo_type="dataset"))
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors, a missing file offline a ValueError, too
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
        raise UserError(
            f"cannot get {name} of {dataset} from the hub ({reason}): unset HF_HUB_OFFLINE, or {advice}"
        ) from error


def text_of(row: Mapping[str, Any], key: str) -> str:
    """A text of a row.

    Raises:
        KeyError, ValueError: the row has none, or something else.
    """
    if not isinstance(row[key], str):
        raise ValueError(f"{key} is no text")
    return str(row[key])
