"""Two sets of results side by side: cells gained and lost, and for cells in both the paired difference.

A cell is told apart by its label, its moment of compression and its model. Its samples are paired by their id, and only
where both sides met the same prompt: the same prompts artifact (its fingerprint) and the same references. A pair of
different prompts says nothing about a method, so it is refused, and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from kvgauge.evaluation.statistics import summarise

Row = dict[str, Any]
CellKey = tuple[str, str, str]

KEY = ("model", "compress_at", "cell")
BASELINE = "full"
SIDES = ("a", "b")
FIGURES = ("mean", "low", "high", "bytes_ratio")
DIFFERENCE = ("diff", "diff_low", "diff_high", "p_value", "detectable")
OTHER_PROMPTS, OTHER_REFERENCES = "other prompts", "other references"


@dataclass(frozen=True)
class SideBySide:
    """Rows of figures, each with the ``cell``, ``model`` and ``compress_at``.

    Attributes:
        compared: cells in both: ``n`` pairs, for each side the mean of task means over them with its interval and the
            share of bytes (``a``, ``a_low``, ``a_high``, ``a_bytes_ratio``, likewise ``b``), the mean paired difference
            B minus A with its 95% interval (``diff``, ``diff_low``, ``diff_high``), the sign test's ``p_value``, the
            smallest ``detectable`` difference, how many samples of the other each side lacks (``a_lacks``,
            ``b_lacks``), how many were ``refused`` as pairs and why, which keys of its configuration have ``changed``,
            and the same figures by task in ``tasks``.
        gained: cells that only B has, with ``n`` and their mean, interval and share of bytes.
        lost: cells that only A has, likewise.
        unpaired: cells in both without a single pair: ``a_n`` and ``b_n`` samples, and how many were ``refused``.
    """

    compared: list[Row] = field(default_factory=list)
    gained: list[Row] = field(default_factory=list)
    lost: list[Row] = field(default_factory=list)
    unpaired: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class Pairing:
    """The samples of one cell.

    Attributes:
        pairs: rows of A and B that answer the same prompt.
        refused: samples with an id of both sides that are no pair, counted by reason.
        a_lacks: samples of B whose id A does not have.
        b_lacks: samples of A whose id B does not have.
    """

    pairs: list[tuple[Row, Row]]
    refused: dict[str, int]
    a_lacks: int
    b_lacks: int


def side_by_side(
    a: Iterable[Row],
    b: Iterable[Row],
    a_configs: Mapping[CellKey, Mapping[str, Any]] = MappingProxyType({}),
    b_configs: Mapping[CellKey, Mapping[str, Any]] = MappingProxyType({}),
    *,
    seed: int = 0,
    resamples: int = 10_000,
) -> SideBySide:
    """Compare two sets of results.

    Args:
        a: rows of ``samples.jsonl``, each with the fingerprint of its prompts as ``prompts``; no cell has a prompt
            twice.
        b: likewise; differences are B minus A.
        a_configs: by cell, what its answers depend on, where that is known.
        b_configs: likewise.
        seed: of the resampling.
        resamples: number of bootstrap resamples.
    """
    first, second = _by_cell(a), _by_cell(b)
    shared = sorted(first.keys() & second.keys(), key=lambda key: _order(first[key][0]))
    pairings = {key: pair(first[key], second[key]) for key in shared}
    paired = [key for key in shared if pairings[key].pairs]
    settings = {"seed": seed, "resamples": resamples}
    figures = _differences([pairings[key].pairs for key in paired], **settings)
    found = SideBySide(
        gained=_alone([second[key] for key in second.keys() - first.keys()], **settings),
        lost=_alone([first[key] for key in first.keys() - second.keys()], **settings),
    )
    for key, figure in zip(paired, figures, strict=True):
        pairing = pairings[key]
        counts = {"a_lacks": pairing.a_lacks, "b_lacks": pairing.b_lacks, "refused": pairing.refused}
        changed = differing(a_configs.get(key, {}), b_configs.get(key, {}))
        setting = {name: second[key][0][name] for name in ("method", "budget")}
        found.compared.append(_named(key) | setting | figure | counts | {"changed": changed})
    for key in shared:
        if not pairings[key].pairs:
            counts = {"a_n": len(first[key]), "b_n": len(second[key])}
            found.unpaired.append(_named(key) | counts | {"refused": pairings[key].refused})
    return found


def pair(a: Iterable[Row], b: Iterable[Row]) -> Pairing:
    """Pair the samples of one cell by their ids where they answer the same prompt."""
    first, second = _by_sample(a), _by_sample(b)
    found = Pairing([], {}, len(second.keys() - first.keys()), len(first.keys() - second.keys()))
    for name in sorted(first.keys() & second.keys()):
        ours, theirs = first[name], second[name]
        same = sorted(ours.keys() & theirs.keys())
        alike = [prompts for prompts in same if ours[prompts]["answers"] == theirs[prompts]["answers"]]
        found.pairs.extend((ours[prompts], theirs[prompts]) for prompts in alike)
        if not alike:
            reason = OTHER_REFERENCES if same else OTHER_PROMPTS
            found.refused[reason] = found.refused.get(reason, 0) + 1
    return found


def verdict(row: Mapping[str, Any]) -> str:
    """What the interval of a difference says: B is ``better``, ``worse``, or that is ``not settled``."""
    if row["diff_low"] > 0:
        return "better"
    return "worse" if row["diff_high"] < 0 else "not settled"


def differing(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys in which two configurations differ, dotted where they are nested."""
    names: list[str] = []
    for name in sorted({*a, *b}):
        ours, theirs = a.get(name), b.get(name)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            names += differing(ours, theirs, f"{prefix}{name}.")
        elif ours != theirs:
            names.append(f"{prefix}{name}")
    return names


def _by_cell(rows: Iterable[Row]) -> dict[CellKey, list[Row]]:
    found: dict[CellKey, list[Row]] = {}
    for row in rows:
        found.setdefault((row["model"], row["compress_at"], row["cell"]), []).append(row)
    return found


def _by_sample(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Rows by sample id, and below it by the fingerprint of their prompts: a session may hold several benchmarks."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["sample_id"], {})[row["prompts"]] = row
    return found


def _order(row: Row) -> tuple[Any, ...]:
    """The uncompressed cache first, then methods by name, each from its largest budget to its smallest."""
    budget = row["budget"]
    smaller = float("-inf") if budget is None else -budget
    return row["model"], row["compress_at"], row["cell"] != BASELINE, row["method"], smaller, row["cell"]


def _named(key: CellKey) -> Row:
    return dict(zip(KEY, key, strict=True))


def _differences(cells: Sequence[Sequence[tuple[Row, Row]]], **settings: Any) -> list[Row]:
    """The figures of every cell's pairs, in one call, so that the resamples are drawn once."""
    rows = [
        _distinct(row) | {"model": str(number), "compress_at": "", "cell": side}
        for number, pairs in enumerate(cells)
        for both in pairs
        for side, row in zip(SIDES, both, strict=True)
    ]
    summary: dict[tuple[str, str], dict[str, Row]] = {}
    for row in _overall(summarise(rows, "a", **settings)):
        summary.setdefault((row["model"], row["task"]), {})[row["cell"]] = row
    found = []
    for number in range(len(cells)):
        by_task = {task: _joined(sides) for (model, task), sides in summary.items() if model == str(number)}
        tasks = [{"task": task} | figures for task, figures in by_task.items() if task != "all"]
        found.append(by_task["all"] | {"tasks": tasks})
    return found


def _joined(sides: Mapping[str, Row]) -> Row:
    both = {f"{side}_{name}".removesuffix("_mean"): sides[side][name] for side in SIDES for name in FIGURES}
    return {"n": sides["b"]["n"]} | both | {name: sides["b"][name] for name in DIFFERENCE}


def _alone(cells: Iterable[Sequence[Row]], **settings: Any) -> list[Row]:
    """The figures of cells by themselves."""
    found = []
    for rows in sorted(cells, key=lambda rows: _order(rows[0])):
        summary = summarise([_distinct(row) for row in rows], **settings)
        [overall] = [row for row in _overall(summary) if row["task"] == "all"]
        found.append({name: overall[name] for name in (*KEY, "n", *FIGURES)})
    return found


def _overall(summary: Sequence[Row]) -> Iterator[Row]:
    """Of each cell and task one row: over all lengths where it has several, else of the one that it has."""
    several = {tuple(row[name] for name in (*KEY, "task")) for row in summary if row["length"] is None}
    for row in summary:
        if row["length"] is None or tuple(row[name] for name in (*KEY, "task")) not in several:
            yield row


def _distinct(row: Row) -> Row:
    """The row with ids that no sample of other prompts shares."""
    return row | {name: f"{row['prompts']}/{row[name]}" for name in ("sample_id", "prompt") if name in row}
