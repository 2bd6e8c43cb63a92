"""report: tables, plots and one HTML page of what the other stages measured.

    kvgauge report
    kvgauge report report.evaluate=[artifacts/evaluate/kqsvd] report.title="One method"

Reads every finished artifact below ``evaluate/``, ``merge/`` and ``latency/`` unless directories are named. Writes
``report/…/index.html`` with ``table.csv``, ``table.md``, ``metrics.json`` and the figures. Prints the page's size and,
last, its path.
"""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from kvgauge import artifacts, configuration, provenance
from kvgauge.configuration import digest
from kvgauge.errors import UserError, unknown
from kvgauge.report.build import build_report
from kvgauge.stage import stage, stage_directory
from kvgauge.tracking import track

INPUTS = ("evaluate", "merge", "latency")
ILLUSTRATED = ("alignment", "asymmetry", "latency")  # whose directories hold pictures


def run(cfg: DictConfig) -> None:
    pictured = illustrated(cfg)
    chosen = {name: inputs(cfg, name) for name in INPUTS}
    if not any(chosen.values()):
        raise UserError(f"nothing to report below {cfg.artifacts}: run evaluate, merge or latency first")
    fingerprints = {name: {str(path): fingerprint(path) for path in paths} for name, paths in chosen.items()}
    config = {"inputs": fingerprints, "title": cfg.report.title}
    directory = stage_directory(cfg, "report", "report", config)
    artifacts.begin(directory)
    figures = [
        (meta.get("title", picture.stem), meta.get("caption", ""), picture)
        for name in pictured
        for path in finished(cfg, name)
        for meta in [artifacts.read_json(path / artifacts.META)]
        for picture in sorted(path.glob("*.png"))
    ]
    # By name, not by place: the same artifacts elsewhere make the same page.
    made_from = {name: {path.name: fingerprint(path) for path in paths} for name, paths in chosen.items() if paths}
    shown = {key: value for key, value in configuration.plain(cfg).items() if key not in ("out", "artifacts")}
    page = build_report(
        chosen["evaluate"],
        chosen["merge"],
        chosen["latency"],
        out_dir=directory,
        provenance={
            "artifacts": made_from,
            "configuration": shown,
            "configuration hash": digest(shown),
            **provenance.environment(),
        },
        extra_figures=figures,
        title=cfg.report.title,
    )
    artifacts.finish(directory, "report", config)
    track(cfg, directory)
    print(f"a page of {page.stat().st_size / 1000:,.0f} kB, which asks no network")
    print(page.resolve())


def inputs(cfg: DictConfig, name: str) -> list[Path]:
    """The artifacts of one stage to report on: those the configuration names, else all that are finished."""
    named = cfg.report.get(name)
    return [Path(path) for path in named] if named is not None else finished(cfg, name)


def illustrated(cfg: DictConfig) -> list[str]:
    """The stages whose pictures go into the page.

    Raises:
        UserError: one that has no pictures, here or anywhere.
    """
    for name in cfg.report.figures:
        if name not in ILLUSTRATED and not Path(cfg.artifacts, name).is_dir():
            raise unknown("stage with pictures in report.figures", name, ILLUSTRATED)
    return list(cfg.report.figures)


def fingerprint(path: Path) -> str:
    """What the artifact at `path` is known by."""
    return str(artifacts.read_json(path / artifacts.META)["fingerprint"])


def finished(cfg: DictConfig, name: str) -> list[Path]:
    """Every finished artifact of a stage; says on stderr which ones are left out as unfinished."""
    found = []
    for path in sorted(Path(cfg.artifacts, name).glob("*")):
        if (path / artifacts.META).is_file():
            found.append(path)
        elif path.is_dir():
            print(f"left out, not finished: {path}", file=sys.stderr)
    return found


if __name__ == "__main__":
    stage(run)()
