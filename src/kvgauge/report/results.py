"""One side of a comparison: an evaluate directory, a session of them, or either at a git revision."""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvgauge.artifacts import META, read_json
from kvgauge.errors import UserError
from kvgauge.report.collect import merge_samples, read_evaluation
from kvgauge.report.comparison import CellKey, Row
from kvgauge.report.revisions import extract

SAMPLES = "samples.jsonl"
SESSION = "artifacts"  # where the results of a revision stand if nothing else is said


@dataclass(frozen=True)
class Results:
    """What a comparison knows of one side.

    Attributes:
        where: as the user named it.
        directories: the evaluate directories in it.
        samples: their rows, each sample of a cell once, with the fingerprint of its prompts as ``prompts``.
        configs: by cell, everything but the sample that its answers depend on.
        environments: versions of libraries and of the code that the directories were made with.
    """

    where: str
    directories: list[str]
    samples: list[Row]
    configs: dict[CellKey, dict[str, Any]]
    environments: list[dict[str, Any]]

    @property
    def cells(self) -> int:
        """How many cells it has."""
        return len({(row["model"], row["compress_at"], row["cell"]) for row in self.samples})

    def facts(self) -> dict[str, Any]:
        """What to say of it beside the figures."""
        counts = {"cells": self.cells, "samples": len(self.samples)}
        return {"where": self.where, "directories": self.directories, **counts, "environments": self.environments}


def read_results(where: str) -> Results:
    """Read one side of a comparison.

    Args:
        where: an evaluate directory, a directory that holds some (an artifacts directory with ``evaluate/`` in it), or
            ``REV`` or ``REV:path``: the results below ``path`` (``artifacts``) at a git revision.

    Raises:
        UserError: there is no such place, it holds no finished results, or they are damaged or contradictory.
    """
    path = Path(where)
    if path.exists():
        return _read(path, where, str)
    revision, _, inside = where.partition(":")
    with tempfile.TemporaryDirectory(prefix="kvgauge-") as scratch:
        root = extract(revision, inside or SESSION, Path(scratch))

        def name(place: Path) -> str:
            return f"{revision}:{place.relative_to(scratch).as_posix()}"

        try:
            return _read(root, where, name)
        except UserError as error:
            raise UserError(str(error).replace(f"{scratch}/", f"{revision}:")) from error


def evaluations(root: Path, name: Callable[[Path], str] = str) -> list[Path]:
    """The finished evaluate directories in `root`, itself included; says on stderr which are left out as unfinished."""
    inner = root / "evaluate"
    below = inner if inner.is_dir() and not (root / SAMPLES).is_file() else root
    found = []
    for path in sorted(below.glob(f"**/{SAMPLES}")):
        # Prompts are kept in files of the same name.
        if not (path.parent / META).is_file():
            print(f"left out, not finished: {name(path.parent)}", file=sys.stderr)
        elif read_json(path.parent / META).get("stage") == "evaluate":
            found.append(path.parent)
    return found


def _read(root: Path, where: str, name: Callable[[Path], str]) -> Results:
    directories = evaluations(root, name)
    if not directories:
        raise UserError(
            f"{where} holds no finished results of the evaluate stage: name an evaluate directory, an artifacts "
            "directory with evaluate/ in it, or a git revision"
        )
    metas = {path: read_json(path / META) for path in directories}
    rows = {path: read_evaluation(path)[0] for path in directories}
    configs: dict[CellKey, dict[str, Any]] = {}
    for path, meta in metas.items():
        for row in rows[path]:
            configs[row["model"], row["compress_at"], row["cell"]] = meta.get("cells", {}).get(row["cell"], {})
    environments: list[dict[str, Any]] = []
    for meta in metas.values():
        if meta.get("environment", {}) not in environments:
            environments.append(meta.get("environment", {}))
    samples: list[Row] = []
    by_prompts: dict[str, list[Path]] = defaultdict(list)
    for path, meta in metas.items():
        by_prompts[meta["config"]["prompts"]].append(path)
    for prompts, paths in by_prompts.items():
        samples += [row | {"prompts": prompts} for row in merge_samples((path, rows[path]) for path in paths)]
    return Results(where, [name(path) for path in directories], samples, configs, environments)
