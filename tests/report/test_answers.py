"""The best cell of every budget, on rows made by hand."""

from __future__ import annotations

import io
from typing import Any

import pandas as pd
import pytest

from kvgauge.evaluation.statistics import summarise
from kvgauge.report.answers import Answer, answer_table, answers
from kvgauge.report.tables import readable, to_csv

Row = dict[str, Any]


def scored(label: str, scores: list[float], ratio: float | None = None, **changes: Any) -> list[Row]:
    """A cell's samples of one task; its bytes are `ratio` of the uncompressed, or what its label asks for."""
    method, _, budget = label.partition("@")
    kept = ratio if ratio is not None else float(budget) if budget else 1.0
    row = {
        "cell": label,
        "method": method,
        "budget": float(budget) if budget else None,
        "compress_at": "context",
        "model": "m",
        "task": "vt",
        "length": 1024,
        "nbytes": int(1000 * kept),
        "full_nbytes": 1000,
        "fixed_nbytes": 64,
    } | changes
    return [row | {"sample_id": f"vt-{number}", "score": score} for number, score in enumerate(scores)]


def timed(label: str, tpot: float, **changes: Any) -> Row:
    row = {"cell": label, "method": label.partition("@")[0], "budget": None, "model": "m", "batch": 1}
    row |= {"context_length": 1024, "ttft_s": 1.0, "tpot_median_s": 0.1, "tpot_p95_s": 0.1, "tokens_per_s": 10.0}
    row |= {"nbytes": 1, "peak_bytes": None, "tpot_over_static": tpot, "tpot_over_dynamic": 9.0}
    return row | {"ttft_over_static": 2 * tpot} | changes


def found(samples: list[Row], latency: list[Row] | None = None) -> dict[float | None, Answer]:
    return {answer.budget: answer for answer in answers(samples, summarise(samples, resamples=200), latency or [])}


RIGHT, WRONG, HALF = [1.0] * 20, [0.0] * 20, [1.0, 0.0] * 10
FULL = scored("full", RIGHT)


def test_the_best_is_the_highest_mean_and_what_it_beats_is_counted() -> None:
    samples = [
        *FULL,
        *scored("xkv@0.5", [1.0] * 18 + [0.0] * 2),
        *scored("eigen@0.5", HALF),
        *scored("ksvd@0.5", WRONG),
    ]
    answer = found(samples)[0.5]
    assert (answer.cell, answer.competitors, answer.samples) == ("xkv@0.5", 3, 20)
    assert (answer.score, answer.diff) == (pytest.approx(0.9), pytest.approx(-0.1))
    assert answer.score_low < 0.9 < answer.score_high
    assert (answer.open, answer.beaten) == ((), 2)
    assert (answer.bytes_ratio, answer.nbytes, answer.full_nbytes, answer.fixed_nbytes) == (0.5, 500, 1000, 64)


def test_what_may_be_as_good_is_named_the_best_of_it_first() -> None:
    near = [1.0] * 17 + [0.0] * 3
    samples = [*FULL, *scored("xkv@0.5", [1.0] * 18 + [0.0] * 2), *scored("eigen@0.5", near)]
    samples += [*scored("kqsvd@0.5", [0.0] * 2 + [1.0] * 16 + [0.0] * 2), *scored("ksvd@0.5", WRONG)]
    answer = found(samples)[0.5]
    assert (answer.cell, answer.open, answer.beaten) == ("xkv@0.5", ("eigen@0.5", "kqsvd@0.5"), 1)


def test_a_smaller_cell_is_an_answer_for_a_larger_budget() -> None:
    samples = [*FULL, *scored("ksvd@0.5", HALF), *scored("xkv@0.25", RIGHT)]
    by_budget = found(samples)
    assert list(by_budget) == [0.5, 0.25]
    assert (by_budget[0.5].cell, by_budget[0.5].competitors, by_budget[0.5].bytes_ratio) == ("xkv@0.25", 2, 0.25)
    assert (by_budget[0.25].cell, by_budget[0.25].competitors) == ("xkv@0.25", 1)


def test_of_equal_scores_the_smaller_cell_s_is_the_better() -> None:
    samples = [*FULL, *scored("a@0.5", RIGHT), *scored("b@0.5", RIGHT, ratio=0.49)]
    answer = found(samples)[0.5]
    assert (answer.cell, answer.open) == ("b@0.5", ("a@0.5",))


def test_measured_bytes_decide_and_not_the_budget_that_was_asked_for() -> None:
    samples = [*FULL, *scored("press@0.5", RIGHT, ratio=1.0), *scored("ksvd@0.5", HALF, ratio=0.509)]
    answer = found(samples)[0.5]
    assert (answer.cell, answer.competitors) == ("ksvd@0.5", 1)  # 2% above a budget still keep to it
    alone = found([*FULL, *scored("press@0.5", RIGHT, ratio=1.0)])[0.5]
    assert (alone.cell, alone.competitors) == (None, 0)


def test_a_budget_at_which_nothing_scores_has_no_best_cell() -> None:
    answer = found([*FULL, *scored("ksvd@0.5", WRONG), *scored("eigen@0.5", WRONG)])[0.5]
    assert (answer.cell, answer.competitors, answer.score, answer.open) == (None, 2, None, ())


def test_without_budgets_there_is_one_answer_of_any_size() -> None:
    by_budget = found([*FULL, *scored("int4", HALF, ratio=0.3), *scored("int8", RIGHT, ratio=0.6)])
    assert {budget: answer.cell for budget, answer in by_budget.items()} == {None: "int8"}


def test_costs_are_those_of_the_same_cell_at_its_longest_context_and_smallest_batch() -> None:
    samples = [*FULL, *scored("xkv@0.5", RIGHT), *scored("ksvd@0.25", HALF)]
    latency = [
        timed("xkv@0.5", 0.7),
        timed("xkv@0.5", 0.6, context_length=4096),
        timed("xkv@0.5", 0.5, context_length=4096, batch=8),
        timed("xkv@0.5", 0.1, context_length=8192, model="other"),
    ]
    by_budget = found(samples, latency)
    best = by_budget[0.5]
    assert (best.timed_at, best.batch, best.tpot, best.ttft) == (4096, 1, 0.6, 1.2)
    assert (by_budget[0.25].cell, by_budget[0.25].tpot, by_budget[0.25].timed_at) == ("ksvd@0.25", None, None)


def test_models_and_moments_are_compared_each_by_itself() -> None:
    samples = [*FULL, *scored("xkv@0.5", RIGHT), *scored("ksvd@0.5", HALF)]
    seen = [*scored("xkv@0.5", WRONG, compress_at="prompt"), *scored("ksvd@0.5", RIGHT, compress_at="prompt")]
    all_samples = samples + seen
    rows = answers(all_samples, summarise(all_samples, resamples=200))
    assert [(row.compress_at, row.cell) for row in rows] == [("context", "xkv@0.5"), ("prompt", "ksvd@0.5")]


def test_only_prompts_that_all_cells_met_choose_the_best() -> None:
    lucky = [row for row in scored("lucky@0.5", RIGHT) if row["sample_id"] in ("vt-0", "vt-2")]
    answer = found([*FULL, *scored("ksvd@0.5", [1.0, 0.0, 1.0] + [0.0] * 17), *lucky])[0.5]
    assert (answer.samples, answer.open) == (2, ("lucky@0.5",) if answer.cell == "ksvd@0.5" else ("ksvd@0.5",))
    apart = [*FULL, *[row | {"sample_id": "elsewhere"} for row in scored("ksvd@0.5", [1.0])]]
    assert found(apart) == {}


def test_the_table_has_every_number_and_reads_well() -> None:
    samples = [*FULL, *scored("xkv@0.5", RIGHT), *scored("ksvd@0.5", HALF), *scored("zero@0.25", WRONG)]
    table = answer_table(answers(samples, summarise(samples, resamples=200), [timed("xkv@0.5", 0.75)]))
    back = pd.read_csv(io.StringIO(to_csv(table)))
    assert list(back["budget"]) == [0.5, 0.25]
    assert (back["cell"][0], back["score"][0], back["tpot"][0]) == ("xkv@0.5", 1.0, 0.75)
    assert back["cell"].isna().tolist() == [False, True]
    text = readable(table)
    assert {"TPOT / static", "TTFT / static", "shown to be worse"} <= set(text.columns)
    assert not text.isin(["nan", "None"]).to_numpy().any()
