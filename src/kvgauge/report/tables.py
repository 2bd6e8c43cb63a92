"""The report's tables: full numbers for CSV, and the same rows as readable text for Markdown and HTML.

A table of numbers has one column per number. `readable` joins a mean with its interval, prints no more digits than the
interval supports, and leaves out the columns that are empty or say the same in every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from kvgauge.evaluation.statistics import format_interval

Row = dict[str, Any]

WEIGHTS = "weights_nbytes"  # of the model: read in every step, and smaller where they are quantised
SETTING = ["cell", "method", "budget", "model", "compress_at", "length"]
TIMES = {"ttft_s": "TTFT", "tpot_median_s": "TPOT", "tpot_p95_s": "TPOT p95"}
LATENCY_IN_MAIN = ["ttft_s", "tpot_median_s", "tokens_per_s", "tpot_over_static", "tpot_over_dynamic"]
LATENCY_KEY = ["cell", "method", "budget", "model", "batch", "context_length"]
TITLES = {
    "bytes_ratio": "bytes / full",
    "fixed_nbytes": "fixed bytes",
    "p_value": "p (sign test)",
    "detectable": "smallest detectable",
    "tokens_per_s": "tokens/s",
    "peak_bytes": "peak memory",
    "nbytes": "cache",
    WEIGHTS: "weights",
    "tpot_over_static": "TPOT / static",
    "tpot_over_dynamic": "TPOT / dynamic",
    "tpot_over_one_pass": "TPOT / one-pass",
    "ttft_over_static": "TTFT / static",
    "context_length": "context",
    "timed_at": "timed at",
    "compress_at": "compressed at",
    "dominated_by": "dominated by",
    "other_bytes_ratio": "its bytes / full",
    "published": "best published",
    "published_score": "its score",
    "published_bytes_ratio": "bytes / full (published)",
    "ttft": "TTFT / static",
    "tpot": "TPOT / static",
    "full_nbytes": "uncompressed",
    "open": "not settled",
    "beaten": "shown to be worse",
    "combination": "best combination",
    "combination_score": "score (combination)",
    "combination_bytes_ratio": "bytes / full (combination)",
    "rank_k": "rank K",
    "rank_v": "rank V",
    "kl": "KL",
    "perplexity_full": "perplexity (full)",
    "context": "question unseen",
    "prompt": "question seen",
    "start_bytes_ratio": "at the start",
    "peak_bytes_ratio": "at the peak",
    "end_bytes_ratio": "at the end",
    "overrun": "over the budget",
    "written": "tokens written",
    "diff_context": "diff, unseen",
    "diff_prompt": "diff, seen",
} | TIMES
DROPPED_IF_CONSTANT = ["model", "compress_at", "length", "batch", "context_length", "method", WEIGHTS]


def main_table(cells: Sequence[Row], latency: Sequence[Row] = ()) -> pd.DataFrame:
    """One row per cell, model, ``compress_at`` and length: means of tasks with intervals, bytes, differences, latency.

    Args:
        cells: rows as `kvgauge.evaluation.statistics.summarise` makes them.
        latency: rows of the latency stage; the longest context and the smallest batch measured for a cell are shown.

    Bytes of the model's weights have a column where the cells know them.

    Returns:
        Numbers, unrounded. A task's mean stands in the column of its name, the interval in ``<task>_low`` and
        ``<task>_high``; "all" is the mean of task means, ``diff`` its difference from the uncompressed cache.
    """
    if not cells:
        return pd.DataFrame()
    tasks = task_names(cells)
    rows: dict[tuple[Any, ...], Row] = {}
    for cell in cells:
        row = rows.setdefault(tuple(cell[name] for name in SETTING), {name: cell[name] for name in SETTING})
        if cell["task"] == "all":
            row |= {name: cell[name] for name in ("n", "bytes_ratio", "fixed_nbytes")} | {WEIGHTS: cell.get(WEIGHTS)}
            row |= {name: cell[name] for name in ("diff", "diff_low", "diff_high", "p_value", "detectable")}
        row |= {cell["task"]: cell["mean"], f"{cell['task']}_low": cell["low"], f"{cell['task']}_high": cell["high"]}
    order = [*SETTING, "n", "bytes_ratio", "fixed_nbytes", *_interval_columns("all"), *_interval_columns("diff")]
    order += ["p_value", "detectable", *(name for task in tasks for name in _interval_columns(task))]
    table = pd.DataFrame(list(rows.values()))
    if table.get(WEIGHTS) is not None and table[WEIGHTS].notna().any():
        order.insert(order.index("fixed_nbytes") + 1, WEIGHTS)
    table = table.reindex(columns=order)
    return _with_latency(table, latency) if latency else table


def latency_table(latency: Sequence[Row]) -> pd.DataFrame:
    """Latency by cell, batch and context length; the median where a setting was measured more than once."""
    if not latency:
        return pd.DataFrame()
    frame = pd.DataFrame.from_records(list(latency))
    keys = [name for name in LATENCY_KEY if name in frame]
    numbers = [*TIMES, "tokens_per_s", "nbytes", "peak_bytes", "tpot_over_static", "tpot_over_dynamic"]
    numbers.append("ttft_over_static")
    numbers += [name for name in ("tpot_over_one_pass", WEIGHTS) if name in frame]
    frame[["budget", *numbers]] = frame[["budget", *numbers]].apply(pd.to_numeric)
    return frame.groupby(keys, dropna=False, as_index=False)[numbers].median()


def timed_cells(latency: Sequence[Row]) -> pd.DataFrame:
    """One row of `latency_table` per model and cell: the longest context and the smallest batch measured for it."""
    table = latency_table(latency).sort_values(["context_length", "batch"], ascending=[False, True])
    return table.drop_duplicates([name for name in ("model", "cell") if name in table])


def fidelity_table(fidelity: Sequence[Row], model: Sequence[Row]) -> pd.DataFrame:
    """Fidelity by cell: the mean error of each quantity over layers and sequences, and the model's own figures.

    Args:
        fidelity: rows of ``fidelity.json``; error is a relative Frobenius error.
        model: rows of ``model.json``; KL in nats per token.
    """
    if not (fidelity or model):
        return pd.DataFrame()
    keys = ["model", "label"]
    parts: list[pd.DataFrame] = []
    if model:
        frame = _labelled(model)
        frame["bytes_ratio"] = frame["nbytes"] / frame["full_nbytes"]
        parts.append(frame.groupby(keys)[["bytes_ratio", "kl", "perplexity", "perplexity_full"]].mean())
    if fidelity:
        frame = _labelled(fidelity)
        quantities = sorted({str(row["quantity"]) for row in fidelity}, key=quantity_order)
        errors = frame.pivot_table(index=keys, columns="quantity", values="error", aggfunc="mean")
        parts.append(errors[quantities])
    heads = pd.concat([_labelled(rows) for rows in (model, fidelity) if rows]).groupby(keys)
    parts[:0] = [heads[["method", "budget"]].first(), heads[["rank_k", "rank_v"]].mean()]
    table = pd.concat(parts, axis=1).reset_index().rename(columns={"label": "cell"})
    table["smaller"] = -table["budget"].fillna(np.inf)
    table = table.sort_values(["model", "method", "smaller", "cell"], ignore_index=True).drop(columns="smaller")
    named = bool((table["model"] != "").any())
    return table[["cell", *table.columns.drop(["cell"] if named else ["cell", "model"])]]


def fidelity_label(row: Row) -> str:
    """The cell that a fidelity row belongs to: its own label, or its method with the budget or the ranks."""
    if row.get("cell"):
        return str(row["cell"])
    if row["budget"] is not None:
        return f"{row['method']}@{row['budget']:g}"
    if row["rank_k"] is None and row["rank_v"] is None:
        return str(row["method"])
    ranks = f"{row['rank_k']}" if row["rank_k"] == row["rank_v"] else f"{row['rank_k']},{row['rank_v']}"
    return f"{row['method']}@r{ranks}"


def quantity_order(quantity: str) -> tuple[int, str]:
    """Sorting key: inputs of attention first, then what is made of them."""
    known = ["K", "Q", "V", "KQ", "VO", "softmax", "output"]
    return (known.index(quantity) if quantity in known else len(known), quantity)


def task_names(cells: Sequence[Row]) -> list[str]:
    """The tasks of the rows in a fixed order, without "all"."""
    return sorted({str(cell["task"]) for cell in cells} - {"all"})


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The table as text: means joined with their intervals, units, and nothing that every row repeats."""
    text = pd.DataFrame(index=table.index)
    for name in _shown(table):
        column = table[name]
        if f"{name}_low" in table.columns:
            text[_title(name)] = [
                "" if pd.isna(mean) else format_interval(mean, low, high)
                for mean, low, high in zip(column, table[f"{name}_low"], table[f"{name}_high"], strict=True)
            ]
        else:
            blank = "all" if name == "length" else ""
            text[_title(name)] = [blank if pd.isna(value) else _formatted(name, value) for value in column]
    return text


def numbers(table: pd.DataFrame) -> pd.DataFrame:
    """The numbers behind `readable`, with its columns and unrounded: what its rows are sorted by.

    None where a number is missing, and throughout columns of text.
    """
    columns = {
        _title(name): [None if isinstance(value, str) or pd.isna(value) else float(value) for value in table[name]]
        for name in _shown(table)
    }
    return pd.DataFrame(columns, index=table.index, dtype=object)


def constants(table: pd.DataFrame) -> str:
    """What `readable` left out because every row says it, as one line."""
    said = [
        f"{_title(name)} {_formatted(name, table[name].iloc[0])}"
        for name in DROPPED_IF_CONSTANT
        if name in table
        and len(table) > 1
        and table[name].nunique(dropna=False) == 1
        and table[name].notna().all()
        # A length of 0 means that prompts are as long as they are.
        and not (name == "length" and table[name].iloc[0] == 0)
    ]
    return ", ".join(said)


def to_csv(table: pd.DataFrame) -> str:
    """The numbers as CSV."""
    return str(table.to_csv(index=False, lineterminator="\n"))


def to_markdown(table: pd.DataFrame) -> str:
    """The readable form as a Markdown table."""
    return str(readable(table).to_markdown(index=False, disable_numparse=True)) + "\n"


def format_bytes(nbytes: float) -> str:
    """Bytes in binary units with three significant digits, e.g. ``1.25 MiB``."""
    value, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 100 else f"{value:.3g} {unit}"


def format_seconds(seconds: float) -> str:
    """A duration with three significant digits in seconds, milliseconds or microseconds."""
    for scale, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        value = seconds * scale
        if abs(value) >= 1 or unit == "µs":
            break
    return f"{value:.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"


def _shown(table: pd.DataFrame) -> list[str]:
    """The columns of the readable form: no ends of intervals, nothing empty, nothing that every row repeats."""
    kept: list[str] = []
    for name in map(str, table.columns):
        base = name.removesuffix("_low").removesuffix("_high")
        repeated = len(table) > 1 and name in DROPPED_IF_CONSTANT and table[name].nunique(dropna=False) == 1
        if (base == name or base not in table.columns) and not table[name].isna().all() and not repeated:
            kept.append(name)
    return kept


def _interval_columns(name: str) -> list[str]:
    return [name, f"{name}_low", f"{name}_high"]


def _with_latency(table: pd.DataFrame, latency: Sequence[Row]) -> pd.DataFrame:
    timed = timed_cells(latency).rename(columns={"context_length": "timed_at"})
    keys = [name for name in ("model", "cell") if name in timed]
    joined = table.merge(timed[[*keys, "timed_at", *LATENCY_IN_MAIN]], how="left", on=keys)
    if table["length"].isna().any():
        # One length was timed: beside the other lengths' accuracy its figures would be taken for theirs.
        joined.loc[joined["length"].notna(), ["timed_at", *LATENCY_IN_MAIN]] = float("nan")
    return joined


def _labelled(rows: Sequence[Row]) -> pd.DataFrame:
    frame = pd.DataFrame.from_records(list(rows))
    frame["label"] = [fidelity_label(row) for row in rows]
    frame["model"] = [str(row.get("model", "")) for row in rows]
    frame[["budget", "rank_k", "rank_v"]] = frame[["budget", "rank_k", "rank_v"]].apply(pd.to_numeric)
    return frame


def _title(name: str) -> str:
    return TITLES.get(name, name)


def _formatted(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if name in TIMES:
        return format_seconds(float(value))
    if name in ("nbytes", "full_nbytes", "fixed_nbytes", "peak_bytes", WEIGHTS):
        return format_bytes(float(value))
    if name in ("n", "samples", "competitors", "beaten", "length", "batch", "context_length", "timed_at"):
        return f"{int(value):,}"
    if name == "written":
        return f"{float(value):,.0f}"
    if name.endswith("bytes_ratio") or name == "overrun":
        return f"{float(value):.3f}"
    if name == "p_value":
        return "< 0.001" if value < 0.001 else f"{float(value):.2g}"
    if name == "detectable":
        return f"{float(value):.2f}"
    return f"{float(value):.3g}"
