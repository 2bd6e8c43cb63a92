"""The table by task type against means taken by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kvgauge.report import build_report
from kvgauge.report.tables import readable
from kvgauge.report.task_types import task_type_table

Row = dict[str, Any]


def _row(table: pd.DataFrame, kind: str, cell: str) -> Row:
    [row] = table[(table["type"] == kind) & (table["cell"] == cell)].to_dict("records")
    return {str(name): value for name, value in row.items()}


@pytest.fixture
def samples(make_samples: Callable[..., list[Row]]) -> list[Row]:
    """The question unseen, and seen with other scores; the uncompressed cell at one moment only."""
    unseen = make_samples(("kvslimmer",), (0.5,), (1024,), 6)
    seen = [
        row | {"compress_at": "prompt", "score": row["score"] / 2} for row in unseen if row["method"] == "kvslimmer"
    ]
    return unseen + seen


def test_a_row_per_type_and_cell_with_both_moments_side_by_side(samples):
    table = task_type_table(samples)
    assert list(table["type"].unique()) == ["retrieval", "aggregation", "qa"]
    assert len(table) == 3 * 2
    row = _row(table, "aggregation", "kvslimmer@0.5")
    assert row["tasks"] == "cwe, vt"
    for moment in ("context", "prompt"):
        means = [
            np.mean(
                [s["score"] for s in samples if (s["task"], s["cell"], s["compress_at"]) == (task, row["cell"], moment)]
            )
            for task in ("cwe", "vt")
        ]
        full = [
            np.mean([s["score"] for s in samples if (s["task"], s["cell"]) == (task, "full")]) for task in ("cwe", "vt")
        ]
        assert row[moment] == pytest.approx(np.mean(means))
        assert row[f"diff_{moment}"] == pytest.approx(np.mean(means) - np.mean(full))
        assert row[f"{moment}_low"] <= row[moment] <= row[f"{moment}_high"]
    assert row["context"] != row["prompt"]


def test_the_uncompressed_cell_has_no_moment(samples):
    row = _row(task_type_table(samples), "qa", "full")
    assert row["context"] == row["prompt"] and np.isnan(row["diff_context"])


def test_a_type_of_several_lengths_is_one_row(make_samples):
    samples = make_samples(("kvslimmer",), (0.5,), (512, 1024), 4)
    row = _row(task_type_table(samples), "qa", "kvslimmer@0.5")
    assert row["n"] == 8
    assert row["context"] == pytest.approx(
        np.mean([s["score"] for s in samples if (s["task"], s["cell"]) == ("qa_1", "kvslimmer@0.5")])
    )


def test_held_out_text_is_a_type_of_its_own(samples):
    prediction = {"method": "kvslimmer", "cell": "kvslimmer@0.5", "budget": 0.5, "rank_k": None, "rank_v": None}
    predictions = [
        prediction | {"model": "smollm2-135m", "sequence": 0, "kl": 0.1, "perplexity": 12.0, "perplexity_full": 10.0},
        prediction | {"model": "smollm2-135m", "sequence": 1, "kl": 0.3, "perplexity": 24.0, "perplexity_full": 20.0},
        prediction | {"sequence": 0, "kl": None, "perplexity": None, "perplexity_full": None},
    ]
    table = task_type_table(samples, predictions)
    assert list(table["type"])[-2:] == ["language modelling"] * 2
    row = _row(table, "language modelling", "kvslimmer@0.5")
    assert (row["kl"], row["perplexity"], row["perplexity_full"], row["n"]) == (pytest.approx(0.2), 18.0, 15.0, 2)
    assert _row(table, "language modelling", "full")["perplexity"] == 15.0
    other = prediction | {"cell": "kvslimmer@0.25", "model": "smollm2-135m", "sequence": 0, "kl": 0.4}
    mixed = task_type_table(samples, [*predictions, other | {"perplexity": 9.0, "perplexity_full": 8.0}])
    assert list(mixed[mixed["type"] == "language modelling"]["cell"]) == ["kvslimmer@0.5", "kvslimmer@0.25"]
    text = readable(table)
    assert {"type", "question unseen", "question seen", "KL"} <= set(text.columns)
    assert not text.isin(["nan"]).to_numpy().any()


def test_a_benchmark_s_own_types_stand_behind_those_of_all(samples):
    named = {"niah_single_1": "retrieval", "vt": "riddle", "cwe": "anagram", "qa_1": None}
    rows = [row | {"kind": named[row["task"]]} for row in samples if row["task"] in named]
    predictions = [
        {"method": "full", "cell": "full", "budget": None, "rank_k": None, "rank_v": None, "sequence": 0}
        | {"kl": 0.0, "perplexity": 9.0, "perplexity_full": 9.0}
    ]
    table = task_type_table(rows, predictions)
    assert list(table["type"].unique()) == ["retrieval", "anagram", "riddle", "language modelling", "other"]


def test_rows_that_do_not_say_their_kind_are_of_another(samples):
    old = [{key: value for key, value in row.items() if key != "kind"} for row in samples]
    table = task_type_table(old)
    assert set(table["type"]) == {"other"}
    assert _row(table, "other", "full")["tasks"] == "cwe, niah_multikey_1, niah_single_1, qa_1, vt"


def test_the_report_has_the_table(stages: dict[str, list[Path]], tmp_path: Path) -> None:
    index = build_report(**stages, out_dir=tmp_path / "out", provenance={})
    assert "By task type" in index.read_text()
    table = pd.read_csv(index.parent / "task_types.csv")
    assert set(table["type"]) == {"retrieval", "aggregation", "qa", "language modelling"}
    assert "| retrieval" in (index.parent / "task_types.md").read_text()
