"""Read what the evaluate, merge and latency stages wrote, and refuse what is missing, torn or contradictory.

A row is a dict as the stage wrote it. What is checked here need not be checked again by tables and plots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvgauge.artifacts import read_json, read_lines
from kvgauge.contract.benchmark import AVERAGE_KEYS
from kvgauge.errors import UserError
from kvgauge.evaluation.statistics import summarise

Row = dict[str, Any]

CELL_KEYS = ("cell", "compress_at", "model", "task", "length", "n")
SAMPLE_KEYS = (
    *("cell", "method", "budget", "compress_at", "model", "sample_id", "task", "length", "score"),
    *("nbytes", "full_nbytes", "nbytes_by_part", "fixed_nbytes"),
)
DIFFERENCE_KEYS = ("diff", "diff_low", "diff_high", "p_value", "detectable")
FIDELITY_KEYS = ("method", "budget", "rank_k", "rank_v", "layer", "quantity", "error", "sequence")
MODEL_KEYS = (
    *("method", "budget", "rank_k", "rank_v", "sequence", "kl", "perplexity", "perplexity_full"),
    *("nbytes", "full_nbytes"),
)
LATENCY_KEYS = (
    *("cell", "method", "budget", "batch", "context_length", "ttft_s", "tpot_median_s", "tpot_p95_s", "tokens_per_s"),
    *("nbytes", "peak_bytes", "tpot_over_static", "tpot_over_dynamic", "ttft_over_static"),
)


@dataclass(frozen=True)
class Measurements:
    """Everything a report shows, as rows: samples and their cells, fidelity by layer and of the model, latency.

    Averages stand apart for each directory of evaluate, each with ``n``, the number of samples in it.
    """

    samples: list[Row] = field(default_factory=list)
    cells: list[Row] = field(default_factory=list)
    fidelity: list[Row] = field(default_factory=list)
    model: list[Row] = field(default_factory=list)
    latency: list[Row] = field(default_factory=list)
    averages: list[list[Row]] = field(default_factory=list)


def collect(
    evaluate_dirs: Iterable[Path | str] = (),
    merge_dirs: Iterable[Path | str] = (),
    latency_dirs: Iterable[Path | str] = (),
) -> Measurements:
    """Read the stages' output directories.

    The cells are summarised anew from all samples together, so that a method evaluated in one directory is paired with
    the uncompressed run of another; where no directory holds the uncompressed run, the differences are those that the
    evaluate stage wrote. A sample that several directories hold (a sweep evaluates the uncompressed cache
    once per method) counts once.

    Args:
        evaluate_dirs: directories with ``samples.jsonl`` and ``cells.json``, and with ``averages.json`` where the
            benchmark has averages of its own.
        merge_dirs: directories with ``fidelity.json`` and ``model.json``.
        latency_dirs: directories with ``latency.json``.

    Raises:
        UserError: there is no directory at all, a file is missing or half written, a row lacks a key, or two
            directories hold different scores of one sample.
    """
    evaluated, merged, timed = (_distinct(paths) for paths in (evaluate_dirs, merge_dirs, latency_dirs))
    if not (evaluated or merged or timed):
        raise UserError("nothing to report: give at least one output directory of evaluate, merge or latency")
    results = [(directory, *read_evaluation(directory)) for directory in evaluated]
    samples = merge_samples((directory, rows) for directory, rows, _ in results)
    try:
        cells = summarise(samples)
    except ValueError as error:
        raise UserError(f"the samples in {_listed(evaluated)} cannot be summarised: {error}") from error
    written = [row for _, _, rows in results for row in rows]
    _keep_differences(cells, written)
    _keep_weights(cells, written)
    return Measurements(
        samples=samples,
        cells=cells,
        fidelity=[row for path in merged for row in _read_rows(path / "fidelity.json", FIDELITY_KEYS, "merge")],
        model=[row for path in merged for row in _read_rows(path / "model.json", MODEL_KEYS, "merge")],
        latency=[row for path in timed for row in _read_rows(path / "latency.json", LATENCY_KEYS, "latency")],
        averages=[_read_averages(directory, rows) for directory, rows, _ in results],
    )


def _distinct(paths: Iterable[Path | str]) -> list[Path]:
    """The directories in a fixed order, each once: the order of the arguments must not change the report."""
    return sorted({Path(path) for path in paths})


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(str(path) for path in paths)


def _read_rows(path: Path, keys: Sequence[str], stage: str) -> list[Row]:
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path} is not a list of objects: run the {stage} stage again")
    return [_required(row, keys, f"row {number} of {path}", stage) for number, row in enumerate(rows, start=1)]


def _required(row: Any, keys: Sequence[str], where: str, stage: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where} is not an object: run the {stage} stage again")
    lacking = [key for key in keys if key not in row]
    if lacking:
        raise UserError(f"{where} has no {', '.join(lacking)}: run the {stage} stage again")
    return row


def read_evaluation(directory: Path) -> tuple[list[Row], list[Row]]:
    """Samples and cells of one directory, checked against each other: ``cells.json`` is written last."""
    path = directory / "samples.jsonl"
    samples = [
        _required(row, SAMPLE_KEYS, f"line {number} of {path}", "evaluate")
        for number, row in enumerate(read_lines(path), start=1)
    ]
    if not samples:
        raise UserError(f"{path} has no samples: run the evaluate stage again")

    cells = _read_rows(directory / "cells.json", CELL_KEYS, "evaluate")
    stated = {
        (cell["model"], cell["compress_at"], cell["cell"], cell["task"], cell["length"]): cell["n"]
        for cell in cells
        if cell["task"] != "all" and cell["length"] is not None
    }
    keys = ("model", "compress_at", "cell", "task", "length")
    prompts = {(tuple(row[key] for key in keys), row.get("prompt", row["sample_id"])) for row in samples}
    found = Counter(setting for setting, _ in prompts)  # repeated answers to a prompt count once
    if stated != dict(found):
        raise UserError(
            f"{path} and cells.json beside it do not belong together "
            f"({len(samples)} samples against {sum(stated.values())}): run the evaluate stage again"
        )
    return samples, cells


def _read_averages(directory: Path, samples: Sequence[Row]) -> list[Row]:
    """The benchmark's own averages in a directory, if there are any, with the number of the samples in each."""
    path = directory / "averages.json"
    if not path.exists():
        return []
    counts: dict[tuple[Any, ...], Counter[tuple[str, int]]] = {}
    for sample in samples:
        counts.setdefault(_setting(sample), Counter())[sample["task"], sample["length"]] += 1
    return [
        row | {"n": _averaged(row, counts.get(_setting(row), Counter()))}
        for row in _read_rows(path, AVERAGE_KEYS, "evaluate")
    ]


def _averaged(average: Row, counts: Mapping[tuple[str, int], int]) -> int:
    """How many of a setting's samples, counted by task and length, are in an average."""
    tasks = average.get("tasks", [task for task, _ in counts])
    return sum(
        count for (task, length), count in counts.items() if task in tasks and average["length"] in (None, length)
    )


def _keep_differences(cells: Iterable[Row], written: Iterable[Row]) -> None:
    """Fill differences that could not be computed here from rows of the same samples whose stage could.

    The evaluate stage knows the uncompressed cache's answers even where its directory holds only a method's own.
    """
    known = {_identity(row): row for row in written if row.get("diff") is not None}
    for cell in cells:
        if cell["diff"] is None and _identity(cell) in known:
            cell.update({name: known[_identity(cell)].get(name) for name in DIFFERENCE_KEYS})


def _keep_weights(cells: Iterable[Row], written: Iterable[Row]) -> None:
    """Fill in the bytes of the weights, which samples do not know; results from before they were counted have none."""
    known = {_setting(row): row["weights_nbytes"] for row in written if "weights_nbytes" in row}
    for cell in cells:
        if _setting(cell) in known:
            cell["weights_nbytes"] = known[_setting(cell)]


def _setting(row: Row) -> tuple[Any, ...]:
    return (row["model"], row["compress_at"], row["cell"])


def _identity(cell: Row) -> tuple[Any, ...]:
    """What tells a row of cells apart, with the number of its samples."""
    return tuple(cell[name] for name in CELL_KEYS)


def merge_samples(by_directory: Iterable[tuple[Path, list[Row]]]) -> list[Row]:
    """All samples, each once."""
    kept: dict[tuple[Any, ...], tuple[Path, Row]] = {}
    for directory, samples in by_directory:
        for row in samples:
            key = (row["model"], row["compress_at"], row["cell"], row["sample_id"])
            if key not in kept:
                kept[key] = (directory, row)
                continue
            other, first = kept[key]
            if other == directory or any(first[name] != row[name] for name in ("score", "nbytes", "full_nbytes")):
                raise UserError(
                    f"sample {row['sample_id']!r} of cell {row['cell']!r} differs or repeats in {other} and "
                    f"{directory}: leave one directory out"
                )
    return [row for _, row in kept.values()]
