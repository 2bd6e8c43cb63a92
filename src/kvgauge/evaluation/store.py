"""The answer store: one small file per cell and sample, so that nothing computed is lost or computed again.

A record is written to a temporary name and renamed, so that it is there whole or not at all, whoever is killed
whenever. It carries the hash of its content: a record that a disk or an editor damaged is not believed, and is made
again. Several runs and processes may share a store; the worst that can happen is that two of them compute the same
record and write the same thing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvgauge.artifacts import replacing, write_json
from kvgauge.configuration import digest

Record = dict[str, Any]


class AnswerStore:
    """Records below a directory, by the fingerprint of the cell and the key of the sample.

    Args:
        root: the directory; made when the first record is written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, cell: str, sample: str) -> Path:
        """Where the record of a sample stands."""
        return self.root / cell / f"{sample}.json"

    def get(self, cell: str, sample: str) -> Record | None:
        """The record, or None where there is none, or only a damaged one."""
        try:
            stored = json.loads(self.path(cell, sample).read_text(encoding="utf-8"))
            record = stored["record"]
            return dict(record) if stored["checksum"] == _checksum(cell, sample, record) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, cell: str, sample: str, record: Mapping[str, Any]) -> None:
        """Write a record, whole or not at all."""
        stored = {"checksum": _checksum(cell, sample, record), "record": record}
        with replacing(self.path(cell, sample)) as scratch:
            scratch.write_text(json.dumps(stored, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")

    def describe(self, cell: str, config: Mapping[str, Any]) -> None:
        """Say beside the records what their cell is, for people; nothing reads it."""
        path = self.root / cell / "cell"
        if not path.exists():
            write_json(path, config)


def _checksum(cell: str, sample: str, record: Mapping[str, Any]) -> str:
    # Cell and sample are part of it: a record copied to another name is as wrong as a damaged one.
    return digest([cell, sample, record], 64)
