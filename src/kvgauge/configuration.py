"""From names and overrides to validated objects: the only place that reads `conf/`.

Hydra composes a run's configuration; the frozen dataclass that a node's ``_target_`` names validates it. The library
functions (`load_model`, `build_method`) read the same YAML files, so a name means the same in Python and on a
command line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

from kvgauge.errors import UserError, unknown


def _conf_dir() -> Path:
    package = Path(__file__).resolve().parent
    packaged = package / "conf"
    return packaged if packaged.is_dir() else package.parents[1] / "conf"


CONF_DIR = _conf_dir()


def names(group: str) -> list[str]:
    """Every name of a configuration group, e.g. ``names("method")``; nested ones as ``tiny/llama``."""
    root = CONF_DIR / group
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def read(group: str, name: str) -> dict[str, Any]:
    """The node ``conf/<group>/<name>.yaml`` as a plain dict.

    Raises:
        UserError: there is no such file; the message names the nearest one.
    """
    if name not in names(group):
        raise unknown(group, name, names(group))
    node = yaml.safe_load((CONF_DIR / group / f"{name}.yaml").read_text(encoding="utf-8"))
    return dict(node or {})


def build(node: Mapping[str, Any] | DictConfig, what: str, **overrides: Any) -> Any:
    """Instantiate the dataclass that ``node["_target_"]`` names.

    Args:
        node: fields of the dataclass and its ``_target_``.
        what: what is being built, for error messages ("method", "model", ...).
        overrides: fields that replace those of the node.

    Raises:
        UserError: no ``_target_``, a field the dataclass does not have, or a value its validation refuses.
    """
    fields = plain(node) | overrides
    target = fields.pop("_target_", None)
    if not target:
        raise UserError(f"the {what} configuration has no _target_: choose one of conf/{what}/")
    module, _, name = str(target).rpartition(".")
    cls = getattr(import_module(module), name)
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    for key in fields:
        if key not in known:
            raise unknown(f"field of {what} {fields.get('name', cls.__name__)}", key, known)
    try:
        return cls(**fields)
    except TypeError as error:
        raise UserError(f"bad {what} configuration: {error}") from error


def plain(node: Any) -> Any:
    """A configuration node as plain dicts and lists, interpolations resolved."""
    if isinstance(node, (DictConfig, ListConfig)):
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
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
