"""Experiment tracking: what a finished artifact holds, logged to Weights & Biases.

Tracking reads the files that a stage wrote and changes nothing about them. The run id comes from the artifact's
fingerprint, so the same configuration continues its run, and different ones stand side by side.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import pandas as pd
from omegaconf import DictConfig

from kvgauge.artifacts import META, read_json
from kvgauge.configuration import digest, plain
from kvgauge.errors import UserError, unknown
from kvgauge.provenance import environment

Mode = Literal["online", "offline", "shared", "disabled"]

MODES = ("auto", "online", "offline", "disabled")
# What the library itself takes in WANDB_MODE, two of them under older names.
ENVIRONMENT_MODES: dict[str, Mode] = {
    "online": "online",
    "offline": "offline",
    "shared": "shared",
    "disabled": "disabled",
    "run": "online",
    "dryrun": "offline",
}
HOST = "https://api.wandb.ai"
TABLES = ("cells", "averages", "fidelity", "model", "latency", "alignment", "asymmetry")  # JSON files that hold rows

CELL_FIGURES = {"score": "mean", "score_low": "low", "score_high": "high", "bytes_ratio": "bytes_ratio", "diff": "diff"}
LATENCY_FIGURES = ("ttft_s", "tpot_median_s", "tokens_per_s", "nbytes", "tpot_over_static")


def track(cfg: DictConfig, directory: Path) -> None:
    """Log a finished artifact as ``cfg.tracker`` says: its configuration and hash, metrics, tables and plots.

    Args:
        cfg: the composed configuration of the stage.
        directory: the artifact.

    Raises:
        UserError: an unknown tracker or mode, or W&B is not installed or refuses the run.
    """
    if cfg.tracker.name == "off":
        return
    if cfg.tracker.name != "wandb":
        raise unknown("tracker", cfg.tracker.name, ("off", "wandb"))
    _track_wandb(cfg, directory)


def _track_wandb(cfg: DictConfig, directory: Path) -> None:
    mode = _mode(cfg.tracker.mode)
    if mode == "disabled":
        return
    try:
        import wandb
    except ImportError as error:
        raise UserError("tracker=wandb needs the wandb package: pip install wandb, or use tracker=off") from error
    meta = read_json(directory / META)
    config = plain({key: value for key, value in cfg.items() if key != "tracker"})
    try:
        run = wandb.init(
            project=cfg.tracker.project,
            entity=cfg.tracker.entity,
            group=cfg.tracker.group,
            job_type=meta["stage"],
            name=directory.name,
            id=os.environ.get("WANDB_RUN_ID") or run_id(meta),  # the agent of a sweep names its runs itself
            resume="allow",
            mode=mode,
            dir=cfg.artifacts,
            config=config | _identity(config, meta) | environment(),
            settings=wandb.Settings(console="off", x_disable_stats=True, silent=True),
        )
    except wandb.Error as error:
        raise UserError(
            f"tracker=wandb: {error}: {directory} is finished; log it with tracker.mode=offline, or mend the login "
            f"and run the same command again"
        ) from error
    with run:
        run.log(scalars(directory))
        for name, rows in tables(directory).items():
            run.log({name: wandb.Table(dataframe=pd.json_normalize(rows))})
        for picture in sorted(directory.glob("*.png")):
            run.log({picture.stem: wandb.Image(str(picture))})


def _identity(config: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    """What tells the runs apart; in a sweep also the configuration, whose keys W&B overwrites with its parameters."""
    hashes = {"config_hash": digest(config), "fingerprint": meta["fingerprint"]}
    return hashes | ({"resolved": config} if os.environ.get("WANDB_SWEEP_ID") else {})


def run_id(meta: Mapping[str, Any]) -> str:
    """The run of an artifact: the same for the same stage and configuration."""
    return f"{meta['stage']}-{meta['fingerprint']}"


def scalars(directory: Path) -> dict[str, float]:
    """The headline numbers of an artifact.

    One evaluated cell logs ``<task>/score``, so that the runs of a sweep share their axes; a panel puts each cell's
    label in front. Latency logs ``<cell>/<batch>x<length>/<figure>``.
    """
    found: dict[str, float] = {}
    cells = _rows(directory / "cells.json")
    labels = {row["cell"] for row in cells}
    for row in cells:
        prefix = f"{row['cell']}/{row['task']}" if len(labels) > 1 else str(row["task"])
        found |= {f"{prefix}/{name}": row[key] for name, key in CELL_FIGURES.items() if row.get(key) is not None}
    for row in _rows(directory / "latency.json"):
        prefix = f"{row['cell']}/{row['batch']}x{row['context_length']}"
        found |= {f"{prefix}/{name}": row[name] for name in LATENCY_FIGURES if row.get(name) is not None}
    for row in _rows(directory / "model.json"):
        prefix = f"{row['method']}/{row['budget']}/{row['sequence']}"
        found |= {f"{prefix}/{name}": row[name] for name in ("kl", "perplexity")}
    if (directory / "metrics.json").is_file():
        found |= read_json(directory / "metrics.json")
    return found


def tables(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """The artifact's tables by name."""
    return {name: rows for name in TABLES if (rows := _rows(directory / f"{name}.json"))}


def _rows(path: Path) -> list[dict[str, Any]]:
    found = read_json(path) if path.is_file() else []
    return found if isinstance(found, list) else []


def _mode(mode: str) -> Mode:
    """``auto`` is what ``WANDB_MODE`` says, and without it online where there is a key, else offline."""
    if mode not in MODES:
        raise unknown("tracker mode", mode, MODES)
    if mode != "auto":
        return ENVIRONMENT_MODES[mode]
    said = os.environ.get("WANDB_MODE")
    if said:
        if said not in ENVIRONMENT_MODES:
            raise unknown("WANDB_MODE", said, ENVIRONMENT_MODES)
        return ENVIRONMENT_MODES[said]
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    """Whether W&B would find credentials: in the environment, or for its server in the file of passwords."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or HOST).netloc
    try:
        entry = netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc").authenticators(server)
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return False
    return bool(entry and entry[2])
