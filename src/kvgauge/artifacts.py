"""What is on disk: where it is, what made it, and safetensors, JSON and JSON Lines in and out.

Every artifact is a directory with a ``meta.json`` written last. Its ``fingerprint`` is the hash of everything that can
change the artifact's content. A stage looks its inputs up by fingerprint, so a directory may have any name, and an
artifact of another model, corpus or configuration is never taken for the one that is needed.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvgauge.configuration import digest
from kvgauge.errors import UserError

META = "meta.json"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        scratch.chmod(0o644)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: run the stage that makes it") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: delete it and run its stage again") from error


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON Lines, whole or not at all."""
    with replacing(path) as scratch, scratch.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON Lines.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: run the stage that makes it") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: delete it and run its stage again") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON-like metadata as one safetensors file, whole or not at all."""
    with replacing(path) as scratch:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, scratch, metadata={"kvgauge": json.dumps(metadata, sort_keys=True)})


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


def finish(directory: Path, stage: str, config: Mapping[str, Any], **facts: Any) -> None:
    """Mark an artifact directory as complete.

    Args:
        directory: the artifact; its files are written already.
        stage: the stage that made it.
        config: everything that can change its content; its hash is the fingerprint.
        facts: what else is worth knowing; not part of the fingerprint.
    """
    write_json(directory / META, {"stage": stage, "config": config, "fingerprint": digest(config), **facts})


def begin(directory: Path) -> Path:
    """Make an artifact directory, and unmark it if it was complete: it is about to change."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / META).unlink(missing_ok=True)
    return directory


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
