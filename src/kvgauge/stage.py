"""How a stage is run from the command line: Hydra in front, one-line errors behind.

A stage is a function of the composed configuration. `stage` makes it a command: ``python -m pipelines.<name>`` with
overrides, ``-m`` for sweeps. A mistake of the user ends in one line and exit code 2; anything else is a defect and
keeps its traceback.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from kvgauge import configuration
from kvgauge.artifacts import META, read_json
from kvgauge.configuration import CONF_DIR, digest
from kvgauge.errors import UserError, unknown

EXIT_USER_ERROR = 2


def stage(run: Callable[[DictConfig], object]) -> Callable[[], None]:
    """Turn a function of the configuration into a command."""

    def main() -> None:
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

    return main


def _guarded(run: Callable[[DictConfig], object]) -> Callable[[DictConfig], object]:
    """End a job of this process at a mistake of the user, before Hydra prints its own lines about it."""

    @functools.wraps(run)
    def guarded(cfg: DictConfig) -> object:
        for source in HydraConfig.get().runtime.config_sources:
            if source.schema == "file":
                configuration.add_directory(Path(source.path))
        try:
            return run(cfg)
        except UserError as error:
            if "BasicLauncher" in str(HydraConfig.get().launcher.get("_target_", "")):
                fail(str(error))
            raise  # from a worker process: the launcher carries it back to `main`

    return guarded


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


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def stage_directory(cfg: DictConfig, name: str, label: str, config: Mapping[str, Any], *, suffix: str = "") -> Path:
    """Where a stage writes: ``<artifacts>/<stage>/<out>``, or ``<label>-<hash of config>`` where no name is given.

    A stage that writes several artifacts of one kind tells them apart by a `suffix` to ``out``.
    """
    hashed = f"{re.sub(r'[^A-Za-z0-9_.@=,-]+', '-', label)}-{digest(config)[:8]}"
    return Path(cfg.artifacts) / name / (f"{cfg.out}{suffix}" if cfg.out else hashed)


def complete(directory: Path, config: Mapping[str, Any]) -> bool:
    """Whether `directory` holds the finished artifact of `config` already; says so on stderr."""
    if not (directory / META).is_file() or read_json(directory / META).get("fingerprint") != digest(config):
        return False
    print(f"up to date: {directory}", file=sys.stderr)
    return True
