"""The subcommands: what runs each of them, and what its source says about it.

Sources are read, not imported, until a command runs: help and completion answer at once.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

from omegaconf import DictConfig

from kvgauge.configuration import CONF_DIR
from kvgauge.fingerprint import module_file
from kvgauge.stage import stage

STAGES = "pipelines."
PACKAGED = Path(__file__).resolve().parents[1] / "pipelines"  # of an installed package; a clone has them beside src/

# A subcommand is a line here: a stage (a function `run` of a configuration) or a module with a function `main`.
COMMANDS: dict[str, str] = {
    "demo": "kvgauge.cli.demo",
    "prepare": f"{STAGES}prepare",
    "collect": f"{STAGES}collect",
    "fit": f"{STAGES}fit",
    "merge": f"{STAGES}merge",
    "evaluate": f"{STAGES}evaluate",
    "latency": f"{STAGES}latency",
    "report": f"{STAGES}report",
    "check": "kvgauge.cli.check",
    "compare": "kvgauge.compare",
    "estimate": "kvgauge.measure.estimate",
    "lm-eval": "kvgauge.lm_eval",
    "methods": "kvgauge.cli.methods",
    "models": "kvgauge.cli.models",
}


def is_stage(name: str) -> bool:
    """Whether a subcommand takes Hydra's overrides."""
    return COMMANDS[name].startswith(STAGES)


def description(name: str) -> str:
    """The docstring of a subcommand's module."""
    return ast.get_docstring(ast.parse(_source(COMMANDS[name]).read_bytes())) or ""


def summary(name: str) -> str:
    """What a subcommand does, in a line."""
    return description(name).partition("\n")[0].removeprefix(f"{name}: ").removesuffix(".")


def run(name: str, arguments: list[str]) -> None:
    """Run a subcommand as if it were a program of its own.

    Args:
        name: one of `COMMANDS`.
        arguments: what stands behind it on the command line.
    """
    if is_stage(name):
        sys.argv = ["kvgauge", *arguments]  # completion is installed for the program's name
        stage(_deferred(COMMANDS[name]), f"usage: kvgauge {name} [flags] [overrides]\n\n{description(name)}")()
    else:
        sys.argv = [f"kvgauge {name}", *arguments]
        import_module(COMMANDS[name]).main()


def _deferred(module: str) -> Callable[[DictConfig], object]:
    """A stage that is imported when its job starts, here or in a launcher's worker process."""

    def run(cfg: DictConfig) -> object:
        return _load(module).run(cfg)

    run.__module__ = module  # what Hydra calls the job by
    return run


def _load(stage_module: str) -> ModuleType:
    """The module of a stage: inside the installed package, or of the clone that the sources belong to."""
    if PACKAGED.is_dir():
        return import_module(f"kvgauge.{stage_module}")
    clone = str(CONF_DIR.parent)
    if sys.path[:1] != [clone]:
        sys.path.insert(0, clone)
    return import_module(stage_module)


def _source(module: str) -> Path:
    if module.startswith(STAGES):
        folder = PACKAGED if PACKAGED.is_dir() else CONF_DIR.parent / "pipelines"
        return folder / f"{module.removeprefix(STAGES)}.py"
    path = module_file(module)
    assert path is not None
    return path
