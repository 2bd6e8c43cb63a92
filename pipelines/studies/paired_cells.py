"""Two cells, or the best of each budget, on chosen prompts of an evaluation: shares of the uncompressed score, paired.

    python -m pipelines.studies.paired_cells artifacts/evaluate/frontier --skip 10
    python -m pipelines.studies.paired_cells artifacts/evaluate/frontier --pairs kqsvd@0.5:ksvd@0.5 xkv@0.25:kqsvd@0.5

``--skip N`` leaves out the first N prompts of every task and length: those that a composition was chosen on have no say
in how good it is. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvgauge.artifacts import read_lines
from kvgauge.errors import UserError
from kvgauge.evaluation.dominance import Comparison, best_by_budget
from kvgauge.evaluation.statistics import summarise
from kvgauge.stage import fail

Row = dict[str, Any]

BASELINE = "full"


def later_prompts(samples: Sequence[Mapping[str, Any]], skip: int) -> list[Row]:
    """The rows without the first `skip` prompts of every task and length, in the order of their ids.

    Raises:
        UserError: none are left.
    """
    ids: dict[tuple[str, int], set[str]] = defaultdict(set)
    for row in samples:
        ids[row["task"], row["length"]].add(row["sample_id"])
    kept = {name for group in ids.values() for name in sorted(group)[skip:]}
    rows = [dict(row) for row in samples if row["sample_id"] in kept]
    if not rows:
        raise UserError(f"no task has more than {skip} prompts: lower --skip")
    return rows


def compare(samples: Sequence[Row], pairs: Sequence[tuple[str, str]], baseline: str = BASELINE) -> dict[str, Any]:
    """Scores, shares of the baseline's score, and paired differences, over the prompts that every cell has met.

    Args:
        samples: rows of ``samples.jsonl`` of one model and one moment of compression.
        pairs: labels of cells, first minus second; without any, the best of each budget are compared.
        baseline: the label whose score is the whole.

    Raises:
        UserError: an unknown label.
    """
    met: dict[str, set[str]] = defaultdict(set)
    for row in samples:
        met[row["cell"]].add(row["sample_id"])
    shared = set.intersection(*met.values())
    samples = [row for row in samples if row["sample_id"] in shared]
    if not samples:
        raise UserError("no prompt was met by every cell: compare cells of one evaluation")
    comparison = Comparison(samples)
    for label in {baseline, *(label for pair in pairs for label in pair)}:
        if label not in comparison.cells:
            raise UserError(f"no cell {label!r}: choose among {', '.join(comparison.cells)}")
    whole = comparison.means()[baseline]
    names = ("cell", "bytes_ratio", "mean", "low", "high", "diff", "diff_low", "diff_high")
    cells = [{name: row[name] for name in names} for row in summarise(samples, baseline) if row["task"] == "all"]
    for row in cells:
        row["share"] = row["mean"] / whole if whole else None
    differences = comparison.differences(pairs) if pairs else best_by_budget(samples, comparison)
    return {"prompts": comparison.samples, "cells": cells, "differences": differences}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare cells on chosen prompts of an evaluation.")
    parser.add_argument("directory", type=Path, help="output directory of the evaluate stage")
    parser.add_argument("--skip", type=int, default=0, help="leave out this many first prompts of every task")
    parser.add_argument("--pairs", nargs="*", default=[], help="cell:cell, first minus second")
    parser.add_argument("--baseline", default=BASELINE)
    options = parser.parse_args()
    try:
        pairs = [_pair(text) for text in options.pairs]
        rows = later_prompts(read_lines(options.directory / "samples.jsonl"), options.skip)
        found = compare(rows, pairs, options.baseline)
    except UserError as error:
        fail(str(error))
    for row in found["cells"]:
        share = "" if row["share"] is None else f"{row['share']:7.0%}"
        score = f"{row['mean']:.3f} [{row['low']:.2f}, {row['high']:.2f}]"
        print(f"{row['cell']:32} {row['bytes_ratio']:.4f}  {score} {share}")
    print(json.dumps({"directory": str(options.directory), "skip": options.skip} | found))


def _pair(text: str) -> tuple[str, str]:
    first, colon, second = text.partition(":")
    if not colon:
        raise UserError(f"--pairs {text}: write two labels with a colon between, e.g. kqsvd@0.5:ksvd@0.5")
    return first, second


if __name__ == "__main__":
    main()
