"""The tables' numbers against hand-computed ones, and their readable form."""

from __future__ import annotations

import io
from typing import Any

import pandas as pd
import pytest

from kvgauge.report import tables

Row = dict[str, Any]


def cell(label: str, task: str, mean: float, **changes: Any) -> Row:
    method, _, budget = label.partition("@")
    row: Row = {
        "cell": label,
        "method": method,
        "budget": float(budget) if budget else None,
        "compress_at": "context",
        "model": "m",
        "task": task,
        "length": 1024,
        "n": 10,
        "mean": mean,
        "low": mean - 0.1,
        "high": mean + 0.1,
        "diff": None,
        "diff_low": None,
        "diff_high": None,
        "p_value": None,
        "detectable": None,
        "bytes_ratio": float(budget) if budget else 1.0,
        "nbytes": 10.0,
        "full_nbytes": 20.0,
        "fixed_nbytes": 2048,
    }
    return row | changes


def timing(label: str, context_length: int, tpot: float, **changes: Any) -> Row:
    method, _, budget = label.partition("@")
    row: Row = {
        "cell": label,
        "method": method,
        "budget": float(budget) if budget else None,
        "batch": 1,
        "context_length": context_length,
        "ttft_s": 1.5,
        "tpot_median_s": tpot,
        "tpot_p95_s": 2 * tpot,
        "tokens_per_s": 1 / tpot,
        "nbytes": 2**20,
        "peak_bytes": 2**30,
        "tpot_over_static": 1.0,
        "tpot_over_dynamic": 0.5,
        "ttft_over_static": 1.25,
    }
    return row | changes


CELLS = [
    cell("full", "all", 0.75),
    cell("full", "niah", 1.0),
    cell("full", "vt", 0.5),
    cell("kqsvd@0.5", "all", 0.5, diff=-0.25, diff_low=-0.4, diff_high=-0.1, p_value=0.0004, detectable=0.2),
    cell("kqsvd@0.5", "niah", 0.75),
    cell("kqsvd@0.5", "vt", 0.25),
]


def test_main_table_has_a_row_per_cell_and_every_number() -> None:
    table = tables.main_table(CELLS)
    assert list(table["cell"]) == ["full", "kqsvd@0.5"]
    row = table.iloc[1]
    assert (row["all"], row["niah"], row["vt"]) == (0.5, 0.75, 0.25)
    assert (row["niah_low"], row["vt_high"]) == pytest.approx((0.65, 0.35))
    assert (row["bytes_ratio"], row["diff"], row["p_value"]) == (0.5, -0.25, 0.0004)


def test_latency_of_the_longest_context_and_the_smallest_batch_is_joined() -> None:
    latency = [
        timing("kqsvd@0.5", 1024, 0.01),
        timing("kqsvd@0.5", 4096, 0.02),
        timing("kqsvd@0.5", 4096, 0.04, batch=8),
    ]
    table = tables.main_table(CELLS, latency)
    assert table["tpot_median_s"].isna().tolist() == [True, False]
    assert (table["tpot_median_s"][1], table["timed_at"][1]) == (0.02, 4096)


def test_latency_stands_beside_the_mean_over_lengths_only() -> None:
    cells = [cell("full", "all", 0.5, length=length) for length in (None, 1024, 4096)]
    table = tables.main_table(cells, [timing("full", 4096, 0.02)])
    assert table["tpot_median_s"].notna().tolist() == [True, False, False]
    assert list(tables.readable(table)["length"]) == ["all", "1,024", "4,096"]


def test_latency_measured_twice_is_the_median() -> None:
    latency = [timing("full", 1024, tpot) for tpot in (0.01, 0.05, 0.02)]
    table = tables.latency_table(latency)
    assert len(table) == 1
    assert table["tpot_median_s"][0] == 0.02


def test_readable_says_no_more_than_it_knows() -> None:
    text = tables.readable(tables.main_table(CELLS, [timing("full", 1024, 0.0123)]))
    assert list(text["all"]) == ["0.75 [0.65, 0.85]", "0.50 [0.40, 0.60]"]
    assert list(text["diff"]) == ["", "-0.25 [-0.40, -0.10]"]
    assert list(text["p (sign test)"]) == ["", "< 0.001"]
    assert list(text["TPOT"]) == ["12.3 ms", ""]
    assert list(text["fixed bytes"]) == ["2 KiB", "2 KiB"]
    assert "model" not in text
    assert "niah_low" not in text


def test_numbers_stand_behind_what_is_read() -> None:
    table = tables.main_table(CELLS, [timing("full", 1024, 0.0123)])
    text, numbers = tables.readable(table), tables.numbers(table)
    assert list(numbers.columns) == list(text.columns)
    assert list(numbers["all"]) == [0.75, 0.5]
    assert list(numbers["p (sign test)"]) == [None, 0.0004]
    assert list(numbers["TPOT"]) == [0.0123, None]
    assert list(numbers["cell"]) == [None, None]


def test_a_cell_is_timed_at_its_longest_context_and_smallest_batch() -> None:
    latency = [timing("full", 1024, 0.1), timing("full", 4096, 0.2, batch=8), timing("full", 4096, 0.3, batch=2)]
    latency += [timing("ksvd@0.5", 512, 0.4)]
    table = tables.timed_cells(latency)
    rows = {row["cell"]: (row["context_length"], row["batch"], row["tpot_median_s"]) for _, row in table.iterrows()}
    assert rows == {"full": (4096, 2, 0.3), "ksvd@0.5": (512, 1, 0.4)}


def test_what_every_row_repeats_is_said_once() -> None:
    assert tables.constants(tables.main_table(CELLS)) == "model m, compressed at context, length 1,024"


def test_csv_gives_the_numbers_back() -> None:
    table = tables.main_table(CELLS)
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(tables.to_csv(table))), table, check_dtype=False)


def test_markdown_is_a_table_with_the_readable_cells() -> None:
    lines = tables.to_markdown(tables.main_table(CELLS)).splitlines()
    assert len(lines) == 4
    assert [part.strip() for part in lines[0].strip("|").split("|")][:3] == ["cell", "method", "budget"]
    assert "0.75 [0.65, 0.85]" in lines[2]


def test_fidelity_table_averages_layers_and_sequences() -> None:
    head = {"method": "ksvd", "budget": 0.5, "rank_k": 8, "rank_v": 4}
    errors = [
        head | {"layer": layer, "sequence": sequence, "quantity": quantity, "error": error}
        for (layer, sequence, quantity), error in {
            (0, 0, "output"): 0.1,
            (1, 0, "output"): 0.3,
            (0, 1, "output"): 0.2,
            (1, 1, "output"): 0.6,
            (0, 0, "K"): 0.5,
        }.items()
    ]
    figures = {"perplexity": 12.0, "perplexity_full": 10.0, "nbytes": 30, "full_nbytes": 60}
    model = [head | figures | {"sequence": sequence, "kl": kl} for sequence, kl in enumerate((0.1, 0.3))]
    table = tables.fidelity_table(errors, model)
    assert list(table.columns[-2:]) == ["K", "output"]
    row = table.iloc[0]
    assert (row["cell"], row["rank_k"], row["rank_v"]) == ("ksvd@0.5", 8, 4)
    assert (row["output"], row["K"], row["kl"], row["bytes_ratio"]) == pytest.approx((0.3, 0.5, 0.2, 0.5))


def test_fidelity_of_two_models_is_kept_apart() -> None:
    head = {"method": "ksvd", "budget": 0.5, "rank_k": 8, "rank_v": 4, "layer": 0, "sequence": 0, "quantity": "K"}
    table = tables.fidelity_table([head | {"model": "a", "error": 0.1}, head | {"model": "b", "error": 0.3}], [])
    assert list(zip(table["model"], table["K"], strict=True)) == [("a", 0.1), ("b", 0.3)]


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ({"method": "xkv", "budget": 0.25, "rank_k": 1, "rank_v": 1, "cell": "xkv-4@0.25"}, "xkv-4@0.25"),
        ({"method": "xkv", "budget": 0.25, "rank_k": 1, "rank_v": 1}, "xkv@0.25"),
        ({"method": "ksvd", "budget": None, "rank_k": 8, "rank_v": 4}, "ksvd@r8,4"),
        ({"method": "ksvd", "budget": None, "rank_k": 8, "rank_v": 8}, "ksvd@r8"),
        ({"method": "full", "budget": None, "rank_k": None, "rank_v": None}, "full"),
    ],
)
def test_fidelity_labels(row: Row, label: str) -> None:
    assert tables.fidelity_label(row) == label


@pytest.mark.parametrize(
    ("nbytes", "text"), [(12, "12 B"), (1024, "1 KiB"), (1.5 * 2**20, "1.5 MiB"), (300 * 2**30, "300 GiB")]
)
def test_bytes(nbytes: float, text: str) -> None:
    assert tables.format_bytes(nbytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(123.4, "123 s"), (0.0123, "12.3 ms"), (4e-6, "4 µs"), (0.0, "0 µs")])
def test_seconds(seconds: float, text: str) -> None:
    assert tables.format_seconds(seconds) == text


def test_bytes_of_weights_have_a_column_where_models_differ_in_them() -> None:
    squeezed = [row | {"model": "m-4bit", "weights_nbytes": 2**20} for row in CELLS]
    dense = [row | {"weights_nbytes": 4 * 2**20} for row in CELLS]
    table = tables.main_table([*dense, *squeezed])
    assert table["weights_nbytes"].tolist() == [4 * 2**20] * 2 + [2**20] * 2
    assert tables.readable(table)["weights"].tolist() == ["4 MiB"] * 2 + ["1 MiB"] * 2
    assert "weights" not in tables.constants(table)
    alone = tables.main_table(squeezed)
    assert "weights" not in tables.readable(alone)
    assert "weights 1 MiB" in tables.constants(alone)
    assert "weights_nbytes" not in tables.main_table(CELLS)
    mixed = tables.main_table([*CELLS, *squeezed])  # results from before weights were counted have none
    assert tables.readable(mixed)["weights"].tolist() == ["", "", "1 MiB", "1 MiB"]


def test_bytes_of_weights_stand_beside_times() -> None:
    rows = [timing("full", 1024, 0.1, model=model, weights_nbytes=size) for model, size in (("a", 2048), ("b", 1024))]
    assert tables.readable(tables.latency_table(rows))["weights"].tolist() == ["2 KiB", "1 KiB"]
    assert "weights_nbytes" not in tables.latency_table([timing("full", 1024, 0.1)])
