"""How a stage is run from the command line: Hydra in front, one-line errors behind.

A stage is a function of the composed configuration. `stage` makes it a command: ``kvgauge <name>``, and in a clone
``python -m pipelines.<name>``, with overrides, ``-m`` for sweeps. A mistake of the user, a full disk or device and a
closed directory end in one line and exit code 2; anything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from kvgauge import configuration
from kvgauge.artifacts import META, NO_ACCESS, NO_ROOM, check_writable, read_json, unwritable
from kvgauge.configuration import CONF_DIR, digest
from kvgauge.errors import UserError, unknown
from kvgauge.run_config import artifact_name, check

EXIT_USER_ERROR = 2


def stage(run: Callable[[DictConfig], object], description: str | None = None) -> Callable[[], None]:
    """Turn a function of the configuration into a command.

    Args:
        run: the stage.
        description: what ``--help`` says above Hydra's help; None takes the docstring of the module of `run`.
    """

    def main() -> None:
        if {"--help", "-h"} & set(sys.argv[1:]):
            module = sys.modules.get(run.__module__)
            print(inspect.cleandoc(description or (module and module.__doc__) or ""), end="\n\n")
        _check_flags()
        os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions arrive here as they are, not printed by Hydra
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        command: Callable[[], None] = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")(
            _guarded(run)
        )
        try:
            command()
        except UserError as error:
            fail(str(error))
        except (ConfigCompositionException, MissingConfigException, OverrideParseException) as error:
            fail(str(_explain(error)))
        except (HydraException, OmegaConfBaseException) as error:
            fail(f"bad configuration: {_first_line(error)}")
        except (ValueError, TypeError) as error:
            if not _of_hydra(error):
                raise
            fail(f"bad configuration: {_first_line(error)}")

    return main


def _check_flags() -> None:
    """End at a flag that Hydra does not have in one line; Hydra itself would print all of them."""
    parser = get_args_parser()
    parser.error = lambda message: fail(f"{message}: --help lists the flags")
    parser.parse_args()


def _guarded(run: Callable[[DictConfig], object]) -> Callable[[DictConfig], object]:
    """End a job of this process at a mistake of the user, before Hydra prints its own lines about it."""

    @functools.wraps(run)
    def guarded(cfg: DictConfig) -> object:
        for source in HydraConfig.get().runtime.config_sources:
            if source.schema == "file":
                configuration.add_directory(Path(source.path))
        try:
            check(cfg)
            return run(cfg)
        except OSError as error:
            if error.errno not in NO_ROOM | NO_ACCESS:
                raise
            _end(unwritable(error.filename or "a file", error))
        except UserError as error:
            _end(error)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which most stages import and some need not
                raise
            _end(
                UserError(f"the device is full ({_first_line(error)[:120]}): take a smaller batch or a shorter context")
            )

    return guarded


def _end(error: UserError) -> NoReturn:
    """End a job of this process; a launcher carries the error of a worker process back to `main`."""
    if "BasicLauncher" in str(HydraConfig.get().launcher.get("_target_", "")):
        fail(str(error))
    raise error


class CommandParser(argparse.ArgumentParser):
    """Arguments of a command that is no stage: a mistake is one line here too.

    Args:
        description: what the command does; shown as it stands.
        prog: what the command is called; None takes the program's name.
    """

    def __init__(self, description: str | None, prog: str | None = None) -> None:
        super().__init__(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        fail(f"{message}: see `{self.prog} --help`")


def fail(message: str) -> NoReturn:
    """Print one line on stderr and end with the exit code of a user's mistake."""
    print(f"kvgauge: {message}", file=sys.stderr)
    raise SystemExit(EXIT_USER_ERROR)


def _explain(error: Exception) -> UserError:
    """Hydra's errors about overrides in one line, with the nearest name where a choice does not exist."""
    text = str(error)
    if missing := re.search(r"Could not find '([\w-]+)/([^']+)'", text):
        group, name = missing.groups()
        return unknown(group, name, configuration.names(group))
    if missing := re.search(r"Could not override '([\w.@/-]+)'", text):
        key = missing.group(1)
        return UserError(f"the configuration has no {key!r}: see conf/config.yaml, or write +{key}=... to add it")
    return UserError(f"bad override: {_first_line(error)}")


def _of_hydra(error: Exception) -> bool:
    """Whether Hydra itself stumbled, over a choice that is a number, say."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").partition(".")[0] in ("hydra", "omegaconf")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def stage_directory(cfg: DictConfig, name: str, label: str, config: Mapping[str, Any], *, suffix: str = "") -> Path:
    """Where a stage writes: ``<artifacts>/<stage>/<out>``, or ``<label>-<hash of config>`` where no name is given.

    A stage that writes several artifacts of one kind tells them apart by a `suffix` to ``out``.

    Raises:
        UserError: ``out`` is a path.
    """
    hashed = f"{re.sub(r'[^A-Za-z0-9_.@=,-]+', '-', label)}-{digest(config)[:8]}"
    chosen = artifact_name(cfg.out)
    return Path(cfg.artifacts) / name / (hashed if chosen is None else f"{chosen}{suffix}")


def complete(directory: Path, config: Mapping[str, Any]) -> bool:
    """Whether `directory` holds the finished artifact of `config` already; says so on stderr.

    Raises:
        UserError: it does not, and could not be written.
    """
    if not (directory / META).is_file() or read_json(directory / META).get("fingerprint") != digest(config):
        check_writable(directory)
        return False
    print(f"up to date: {directory}", file=sys.stderr)
    return True
