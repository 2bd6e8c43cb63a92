"""From names and overrides to validated objects: the only place that reads `conf/`.

Hydra composes a run's configuration; the frozen dataclass that a node's ``_target_`` names validates it. The library
functions (`load_model`, `build_method`) read the same YAML files, so a name means the same in Python and on a
command line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import numbers
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

from kvgauge.errors import UserError, unknown
from kvgauge.field_types import check_fields


def _conf_dir() -> Path:
    package = Path(__file__).resolve().parent
    packaged = package / "conf"
    return packaged if packaged.is_dir() else package.parents[1] / "conf"


CONF_DIR = _conf_dir()


_added: list[Path] = []  # directories of the user's own, see `add_directory`


def add_directory(path: Path) -> None:
    """Let names be found below `path` as well, a directory laid out like `conf/`: what ``--config-dir`` names."""
    if path.resolve() not in (CONF_DIR, *_added):
        _added.append(path.resolve())


def files(group: str) -> dict[str, Path]:
    """The file of every name of a configuration group, e.g. ``files("method")``; nested names as ``tiny/llama``.

    Raises:
        UserError: a directory of the user's own has a name that `conf/` has too.
    """
    found: dict[str, Path] = {}
    for directory in (CONF_DIR, *_added):
        root = directory / group
        for path in sorted(root.rglob("*.yaml")):
            name = path.relative_to(root).with_suffix("").as_posix()
            if name in found:
                raise UserError(f"two files are the {group} {name!r}, {found[name]} and {path}: rename the second")
            found[name] = path
    return found


def names(group: str) -> list[str]:
    """Every name of a configuration group, e.g. ``names("method")``; nested ones as ``tiny/llama``."""
    return sorted(files(group))


def file(group: str, name: str) -> Path:
    """The file ``conf/<group>/<name>.yaml``.

    Raises:
        UserError: there is no such file; the message names the nearest one.
    """
    known = files(group)
    if name not in known:
        raise unknown(group, name, known)
    return known[name]


def about(group: str, name: str) -> str:
    """What the first line of ``conf/<group>/<name>.yaml`` says, where that is a comment; empty for other names."""
    path = files(group).get(name)
    first = "" if path is None else path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def read(group: str, name: str) -> dict[str, Any]:
    """The node ``conf/<group>/<name>.yaml`` as a plain dict.

    Raises:
        UserError: there is no such file, and the message names the nearest one; or it is no YAML.
    """
    path = file(group, name)
    try:
        node = OmegaConf.load(path)  # as Hydra reads it: 1e-3 is a number, 2026-01-01 is a text
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML file: {error}") from error
    if not isinstance(node, DictConfig):
        raise UserError(f"{path} holds a list: a {group} is written as fields, name: value")
    return plain(node, resolve=False)


def target_class(path: str, what: str) -> type[Any]:
    """The class of a dotted path, e.g. ``package.module.Class``.

    Raises:
        UserError: there is no such module or class, or importing it fails.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except AttributeError as error:
        classes = [key for key, value in vars(import_module(module)).items() if isinstance(value, type)]
        raise unknown(f"class in {module}", name, classes) from error
    except ModuleNotFoundError as error:
        raise UserError(
            f"_target_ {path} of a {what}: there is no module {error.name!r}: install its package or correct the path"
        ) from error
    except UserError:
        raise
    except Exception as error:  # whatever the module does when it is imported
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        raise UserError(
            f"_target_ {path} of a {what}: importing {module} failed ({type(error).__name__}: {reason}): mend it first"
        ) from error
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise UserError(f"_target_ {path} of a {what} is no dataclass: its fields are what can be configured")
    return found


def path_of(thing: object) -> str:
    """The dotted path of a class, or of the class of an object."""
    cls = thing if isinstance(thing, type) else type(thing)
    return f"{cls.__module__}.{cls.__qualname__}"


def build(node: Mapping[str, Any] | DictConfig, what: str, **overrides: Any) -> Any:
    """Instantiate the dataclass that ``node["_target_"]`` names.

    Args:
        node: fields of the dataclass and its ``_target_``.
        what: what is being built, for error messages ("method", "model", ...).
        overrides: fields that replace those of the node.

    Raises:
        UserError: no ``_target_`` or one that is not there, a field the dataclass does not have, a value of another
            type than the field's, or one that its validation refuses.
    """
    cls, fields = _checked(node, what, overrides)
    try:
        return cls(**fields)
    except TypeError as error:
        raise UserError(f"bad {what} configuration: {error}") from error


def check(node: Mapping[str, Any] | DictConfig, what: str) -> None:
    """Refuse what `build` refuses before it makes anything: a ``_target_``, a field or a type that is wrong.

    Raises:
        UserError: as `build`.
    """
    _checked(node, what, {})


def _checked(
    node: Mapping[str, Any] | DictConfig, what: str, overrides: Mapping[str, Any]
) -> tuple[type[Any], dict[str, Any]]:
    """The dataclass of a node, and its fields."""
    fields = {name: _python_number(value) for name, value in (plain(node) | dict(overrides)).items()}
    target = fields.pop("_target_", None)
    if not target:
        raise UserError(f"the {what} configuration has no _target_: choose one of conf/{what}/")
    cls = target_class(str(target), what)
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    for key in fields:
        if key not in known:
            raise unknown(f"field of {what} {fields.get('name', cls.__name__)}", key, known)
    check_fields(cls, fields, what)
    return cls, fields


def _python_number(value: Any) -> Any:
    """numpy's numbers as Python's own: what is hashed and stored knows those alone."""
    if isinstance(value, numbers.Integral) and not isinstance(value, int):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, (int, float)) else value


def plain(node: Any, resolve: bool = True) -> Any:
    """A configuration node as plain dicts and lists, interpolations resolved unless they are to stay."""
    if isinstance(node, (DictConfig, ListConfig)):
        return OmegaConf.to_container(node, resolve=resolve, throw_on_missing=resolve)
    if isinstance(node, Mapping):
        return {str(key): plain(value) for key, value in node.items()}
    return node


def digest(value: Any, length: int = 16) -> str:
    """A stable hexadecimal hash of JSON-like data: the fingerprint of a configuration.

    Raises:
        TypeError: the value holds something that JSON does not know.
    """
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]
