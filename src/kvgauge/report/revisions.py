"""Results at a git revision: what stands in git there, and what DVC keeps of its outputs, read without a checkout.

Outputs are read from DVC's local cache only. A remote is never asked: that is what ``dvc pull`` is for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from kvgauge.artifacts import META
from kvgauge.errors import UserError

FILES = ("samples.jsonl", "cells.json", META)
LOCAL_ONLY = {"core": {"remote": ""}}


def extract(revision: str, path: str, target: Path) -> Path:
    """Write the evaluate directories at a revision below `target`.

    Args:
        revision: of the repository of the working directory: a branch, a tag, a commit, ``HEAD~1``, an experiment of
            DVC.
        path: an evaluate directory or one that holds some, from the root of the repository.
        target: an empty directory.

    Returns:
        Where `path` stands below `target`.

    Raises:
        UserError: DVC is not installed, there is no such revision or nothing at `path`, or DVC's cache does not have
            what the revision names.
    """
    try:
        from dvc.api import DVCFileSystem
        from dvc.exceptions import DvcException
        from dvc_data.index import DataIndexDirError
    except ImportError as error:
        raise UserError(
            f"{revision} is no directory, and git revisions need dvc: pip install 'kvgauge[pipeline]'"
        ) from error
    place = PurePosixPath(path)
    where = f"{revision}:{place}"
    if place.is_absolute() or ".." in place.parts:
        raise UserError(f"{where}: write the path from the root of the repository, e.g. {revision}:artifacts")
    try:
        files = DVCFileSystem(rev=revision, config=LOCAL_ONLY)
        contents = {name: files.cat_file(name) for name in _result_files(files, place)}
        unmade = list(_unmade(files.repo, place))
    except (DataIndexDirError, FileNotFoundError) as error:
        raise UserError(
            f"DVC's cache lacks results of {where}: `git checkout {revision}` and `dvc pull` get them from a remote, "
            "`dvc repro` makes them again"
        ) from error
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error}") from error
    except DvcException as error:
        raise UserError(f"{revision} is neither a directory nor a git revision that can be read: {error}") from error
    if not contents:
        made = "no results" if not unmade else "outputs of DVC, but dvc.lock has none of them"
        raise UserError(
            f"there are {made} at {where}: name where they stand ({revision}:path), or `dvc repro` and commit dvc.lock"
        )
    for output in unmade:
        print(f"left out, not made at {revision}: {output} (dvc repro, then commit dvc.lock)", file=sys.stderr)
    for name, content in contents.items():
        written = target / name
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_bytes(content)
    return target / place


def _result_files(files: Any, place: PurePosixPath) -> Iterator[str]:
    """The files of results below a place, from the root; what stands beside ``evaluate/`` is not looked at."""
    inner = place / "evaluate"
    for name in files.find(str(inner if files.isdir(str(inner)) else place)):
        if PurePosixPath(name).name in FILES:
            yield name.lstrip("/")


def _unmade(repo: Any, place: PurePosixPath) -> Iterator[str]:
    """The outputs of evaluations below a place that the revision's ``dvc.lock`` does not have."""
    for out in repo.index.outs:
        if out.use_cache and not out.hash_info and out.is_in_repo:
            path = PurePosixPath(*repo.fs.relparts(out.fs_path, repo.root_dir))
            if path.is_relative_to(place) and "evaluate" in path.parts:
                yield str(path)
