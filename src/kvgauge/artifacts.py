"""What is on disk: where it is, what made it, and safetensors, JSON and JSON Lines in and out.

Every artifact is a directory with a ``meta.json`` written last. Its ``fingerprint`` is the hash of everything that can
change the artifact's content. A stage looks its inputs up by fingerprint, so a directory may have any name, and an
artifact of another model, corpus or configuration is never taken for the one that is needed.

``files`` in ``meta.json`` are those that the run wrote. When another run ends in the same directory, what it did not
write itself and a run before it did is removed; files that no run wrote stay.
"""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from kvgauge.configuration import digest
from kvgauge.errors import UserError
from kvgauge.user_cache import cache_root

if TYPE_CHECKING:
    from torch import Tensor

META = "meta.json"
JOURNAL = ".writing"  # of an artifact in the making: the files that runs wrote there, a line each

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS}

_open: dict[Path, set[str]] = {}  # artifacts that this process is making, and the files that it wrote there


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
        UserError: the disk is full, or the directory cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        scratch.chmod(0o644)
        _record(path)
        scratch.replace(path)
    except OSError as error:
        if error.errno in NO_ROOM | NO_ACCESS:
            raise unwritable(path, error) from error
        raise
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


def check_writable(directory: Path) -> None:
    """Refuse a directory that cannot be made or written, before anything is computed for it.

    Raises:
        UserError: it cannot.
    """
    try:
        place = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    except OSError as error:
        raise unwritable(directory, error) from error
    code = None
    if not place.is_dir():
        code = errno.ENOTDIR
    elif not os.access(place, os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES
    if code is not None:
        raise unwritable(directory, OSError(code, os.strerror(code)))


def unwritable(path: str | Path, error: OSError) -> UserError:
    """What to tell a user whose disk or directory does not take `path`."""
    room = "make room or " if error.errno in NO_ROOM else ""
    setting = "KVGAUGE_CACHE=" if Path(path).is_relative_to(cache_root()) else "artifacts="
    return UserError(
        f"cannot write {path}: {error.strerror or error}: {room}give another place with {setting}, "
        f"then run the same command again: what was finished before is kept"
    )


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        UserError: the file is missing, damaged or out of reach.
    """
    with _reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON Lines, whole or not at all."""
    with replacing(path) as scratch, scratch.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON Lines.

    Raises:
        UserError: the file is missing, damaged or out of reach.
    """
    with _reading(path):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: run the stage that makes it") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: delete it and run its stage again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}: mend its permissions or name another place") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON-like metadata as one safetensors file, whole or not at all."""
    from safetensors.torch import save_file  # only here: a command that shows its help needs no torch

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(path) as scratch:
        try:
            save_file(contiguous, scratch, metadata={"kvgauge": json.dumps(metadata, sort_keys=True)})
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))  # the library says in words what an OSError has as a number
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote: the tensors and the metadata.

    Raises:
        UserError: the file is missing, truncated or not kvgauge's.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})["kvgauge"])
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 - not a dict
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: run the stage that makes it") from error
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise UserError(f"{path} is damaged or not kvgauge's: delete it and run its stage again") from error


def begin(directory: Path) -> Path:
    """Make an artifact directory, and unmark it if it was complete: it is about to change.

    What stands there stays until `finish`, so that a run that is broken off can go on.

    Raises:
        UserError: the directory cannot be made or written.
    """
    former = _journalled(directory) | _files(directory)
    with replacing(directory / JOURNAL) as scratch:
        scratch.write_text("".join(f"{name}\n" for name in sorted(former)), encoding="utf-8")
    (directory / META).unlink(missing_ok=True)
    _open[directory.resolve()] = set()
    return directory


def finish(
    directory: Path, stage: str, config: Mapping[str, Any], *, temporary: Sequence[str] = (), **facts: Any
) -> None:
    """Mark an artifact directory as complete, and remove what former runs wrote there and this one did not.

    Args:
        directory: the artifact; its files are written already, since `begin`.
        stage: the stage that made it.
        config: everything that can change its content; its hash is the fingerprint.
        temporary: folders of the directory whose files only served the run: they are removed in the end.
        facts: what else is worth knowing; not part of the fingerprint.
    """
    written = _open.pop(directory.resolve(), set())
    served = {name for name in written if PurePosixPath(name).parts[0] in temporary}
    meta = {"stage": stage, "config": config, "fingerprint": digest(config), **facts}
    stale = _journalled(directory) - written
    for name in stale:
        _remove(directory, name)
    write_json(directory / META, meta | {"files": sorted(written - served)})
    for name in served:
        _remove(directory, name)
    (directory / JOURNAL).unlink(missing_ok=True)


def add_files(directory: Path, *names: str) -> None:
    """Count files that were written beside those of a finished artifact among its own."""
    if (directory / META).is_file():
        write_json(directory / META, read_json(directory / META) | {"files": sorted({*names, *_files(directory)})})


def _record(path: Path) -> None:
    """Note a file as written by a run, where it belongs to an artifact in the making."""
    path = path.absolute()
    for directory in path.parents:
        written = _open.get(directory.resolve()) if _open else None
        if written is not None:
            name = path.relative_to(directory).as_posix()
            if name not in written and name not in (META, JOURNAL):
                with (directory / JOURNAL).open("a", encoding="utf-8") as journal:
                    journal.write(f"{name}\n")
                written.add(name)
            return


def _journalled(directory: Path) -> set[str]:
    path = directory / JOURNAL
    return set(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else set()


def _files(directory: Path) -> set[str]:
    """The files that the run of a finished artifact wrote; none where its ``meta.json`` does not say."""
    try:
        return set(json.loads((directory / META).read_text(encoding="utf-8")).get("files", ()))
    except (OSError, ValueError, AttributeError, TypeError):
        return set()


def _remove(directory: Path, name: str) -> None:
    """Remove a file inside `directory`, and the folders that it leaves empty."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts:
        return
    path = directory / relative
    if not path.parent.resolve().is_relative_to(directory.resolve()):
        return
    if path.is_file() or path.is_symlink():
        path.unlink()
    for folder in path.parents:
        if folder == directory:
            return
        with suppress(OSError):  # somebody else's files are left in it
            folder.rmdir()


def find(root: str | Path, stage: str, config: Mapping[str, Any], command: str) -> Path:
    """The complete artifact of `stage` with the fingerprint of `config`, wherever it stands below ``root/stage``.

    Args:
        root: the artifacts directory.
        stage: the stage that makes the artifact.
        config: everything that can change its content.
        command: what makes it, for the error message.

    Raises:
        UserError: there is none.
    """
    wanted, root = digest(config), Path(root)
    nearest = ""
    for meta_path in sorted((root / stage).glob(f"**/{META}")):
        meta = read_json(meta_path)
        if meta.get("fingerprint") == wanted:
            return meta_path.parent
        differing = _difference(config, meta.get("config", {}))
        nearest = f" ({meta_path.parent} differs in {differing})" if differing else nearest
    raise UserError(f"no {stage} artifact for this configuration below {root / stage}{nearest}: run `{command}` first")


def _difference(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    keys = [key for key in sorted({*wanted, *found}) if wanted.get(key) != found.get(key)]
    return ", ".join(keys[:4])
