"""A comparison in words and numbers: its tables, for the page and for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from kvgauge.report.comparison import DIFFERENCE, SideBySide, verdict
from kvgauge.report.tables import constants, numbers, readable

Row = dict[str, Any]

TITLES = {
    "a_bytes_ratio": "bytes / full (A)",
    "b_bytes_ratio": "bytes / full (B)",
    "a": "A",
    "b": "B",
    "diff": "B minus A",
    "verdict": "B is",
    "n": "samples",
    "a_lacks": "A lacks",
    "b_lacks": "B lacks",
    "refused": "refused as pairs",
    "a_n": "samples (A)",
    "b_n": "samples (B)",
}
NOTHING_SHARED = "no sample in common"
CELL = ["cell", "model", "compress_at"]
SCORES = ["a", "a_low", "a_high", "b", "b_low", "b_high", *DIFFERENCE[:-1]]  # all but the smallest detectable one
READING = (
    "Means of task means and their differences, with 95% intervals (bootstrap within tasks, the exact binomial bound "
    "where all scores of a task are equal); p is the exact sign test's. Not corrected for the number of cells."
)
REFUSED = (
    "the same id stands for another prompt on the other side: other references, or prompts with another fingerprint "
    "(benchmark, tokenizer or code). Evaluate both on the same prompts to compare them."
)


@dataclass(frozen=True)
class Chapter:
    """A part of a comparison: what it is, a table whose numbers are unrounded, and how to read it."""

    title: str
    text: str
    table: pd.DataFrame
    note: str

    def shown(self) -> pd.DataFrame:
        """The table as text."""
        return readable(self.table).rename(columns=TITLES)

    def keys(self) -> pd.DataFrame:
        """The numbers behind `shown`, None for text: what its rows are sorted by."""
        return numbers(self.table).rename(columns=TITLES)


def chapters(found: SideBySide) -> list[Chapter]:
    """Every part that has something to show."""
    parts = [
        ("In both", verdicts(found.compared), _compared(found.compared), f"{READING} {_why(found.compared)}".strip()),
        ("Gained", "Only B has these; scores on its own samples.", _alone(found.gained), ""),
        ("Lost", "Only A has these; scores on its own samples.", _alone(found.lost), ""),
        (
            "Not paired",
            "Both have these, without a sample to pair.",
            _unpaired(found.unpaired),
            _why(found.unpaired).strip(),
        ),
    ]
    return [_chapter(*part) for part in parts if not part[2].empty]


def by_task(found: SideBySide) -> Chapter:
    """The cells in both task by task."""
    rows = [{name: row[name] for name in CELL} | task for row in found.compared for task in row["tasks"]]
    table = pd.DataFrame.from_records(rows, columns=["cell", "task", *CELL[1:], *SCORES, "n"])
    return _chapter("By task", "", table, "The same, task by task.")


def verdicts(rows: Sequence[Row]) -> str:
    """How many cells are better, worse, not settled, in one line."""
    counts = Counter(verdict(row) for row in rows)
    return (
        f"On the samples that both have, B is better in {counts['better']} and worse in {counts['worse']} of "
        f"{len(rows)} cells; {counts['not settled']} not settled."
    )


def aligned(table: pd.DataFrame) -> str:
    """A table of text for the terminal."""
    return str(table.to_markdown(index=False, disable_numparse=True, tablefmt="simple"))


def _chapter(title: str, text: str, table: pd.DataFrame, note: str) -> Chapter:
    said = constants(table)
    return Chapter(title, text, table, " ".join([note, f"All rows: {said}." if said else ""]).strip())


def _compared(rows: Sequence[Row]) -> pd.DataFrame:
    shown = [row | _said(row) | {"verdict": verdict(row), "changed": ", ".join(row["changed"])} for row in rows]
    order = [*CELL, "a_bytes_ratio", "b_bytes_ratio", *SCORES, "verdict", "n", "a_lacks", "b_lacks"]
    order += [name for name in ("refused", "changed") if any(row[name] for row in rows)]
    return pd.DataFrame.from_records(shown, columns=order)


def _alone(rows: Sequence[Row]) -> pd.DataFrame:
    shown = [row | {"score": row["mean"], "score_low": row["low"], "score_high": row["high"]} for row in rows]
    return pd.DataFrame.from_records(shown, columns=[*CELL, "bytes_ratio", "score", "score_low", "score_high", "n"])


def _unpaired(rows: Sequence[Row]) -> pd.DataFrame:
    shown = [row | _said(row) for row in rows]
    for row in shown:
        row["refused"] = row["refused"] or NOTHING_SHARED
    return pd.DataFrame.from_records(shown, columns=[*CELL, "a_n", "b_n", "refused"])


def _why(rows: Sequence[Row]) -> str:
    return f"Refused: {REFUSED}" if any(row["refused"] for row in rows) else ""


def _said(row: Row) -> dict[str, str]:
    """Counts as text, for they are no measurements to round."""
    counts = {name: f"{row[name]:,}" for name in ("a_lacks", "b_lacks", "a_n", "b_n") if name in row}
    return counts | {"refused": ", ".join(f"{count:,}: {reason}" for reason, count in sorted(row["refused"].items()))}
