"""The fields of `conf/config.yaml` that belong to no group, with their types: checked before a stage does anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from omegaconf import DictConfig

from kvgauge import configuration
from kvgauge.configuration import plain
from kvgauge.errors import UserError
from kvgauge.field_types import check_fields

Directory = Annotated[str, "a directory", "directories"]
Name = Annotated[str, "a name", "names"]
Cell = Annotated[Mapping[str, Any], "a cell {method: name, field: value}", "cells {method: name, field: value}"]


@dataclass(frozen=True)
class RunConfig:
    """What every stage may be told; `conf/config.yaml` says what each means."""

    compress_at: Literal["context", "prompt"]
    budgets: Sequence[float] | None
    panel: Name | Sequence[Cell] | None
    baseline: bool
    batch_size: int
    draft_tokens: int
    turns: int
    temperature: float
    repeats: int
    store: bool
    dry_run: bool
    patience: float
    seed: int
    artifacts: Directory
    out: Name | int | None


@dataclass(frozen=True)
class ReportConfig:
    """What the report reads."""

    title: str
    evaluate: Sequence[Directory] | None
    merge: Sequence[Directory] | None
    latency: Sequence[Directory] | None
    figures: Sequence[Name]


@dataclass(frozen=True)
class FidelityConfig:
    """The contexts of the merge stage."""

    contexts: int
    context_length: int
    continuation: int
    ranks: Sequence[int]


@dataclass(frozen=True)
class TrackerConfig:
    """Where finished artifacts are logged."""

    name: Name
    project: Name | None
    entity: Name | None
    group: Name | None
    mode: Name


PARTS: dict[str, type] = {"report": ReportConfig, "fidelity": FidelityConfig, "tracker": TrackerConfig}
GROUPS = ("model", "method", "corpus", "benchmark", "latency")  # each names its dataclass itself


def check(cfg: DictConfig) -> None:
    """Refuse a configuration with a value of the wrong type, and an ``out`` that is no name.

    Fields that it lacks, and fields that it has beyond these, are no matter of this check.

    Raises:
        UserError: the line says which value, and what would be right.
    """
    check_fields(RunConfig, {name: plain(value) for name, value in cfg.items() if name in RunConfig.__annotations__})
    for name, fields in PARTS.items():
        if name in cfg:
            check_fields(fields, _mapping(cfg, name), name)
    for name in GROUPS:
        if name in cfg:
            configuration.check(_mapping(cfg, name), name)
    artifact_name(cfg.get("out"))


def artifact_name(out: str | int | None) -> str | None:
    """``out`` as the name of a directory; None where none was given.

    Raises:
        UserError: it is a path.
    """
    if out is None or out == "":
        return None
    name = str(out)
    if name in (".", "..") or not name.isprintable() or {"/", "\\"} & set(name):
        raise UserError(f"out is {name!r}: it is the name of a directory, without / or ..; artifacts= is the place")
    return name


def _mapping(cfg: DictConfig, name: str) -> dict[str, Any]:
    found = plain(cfg[name])
    if not isinstance(found, Mapping):
        raise UserError(f"{name} is {found!r}: choose one with {name}=..., set a field with {name}.field=...")
    return dict(found)
