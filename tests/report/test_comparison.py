"""Two sets of results: what is paired with what, and what the paired differences say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvgauge.evaluation.statistics import paired_difference
from kvgauge.report.comparison import differing, pair, side_by_side, verdict

Row = dict[str, Any]


def rows(cell: str, scores: list[float], task: str = "vt", length: int = 1024, **changes: Any) -> list[Row]:
    """A sample for each score, its id made of task, length and place."""
    full = cell == "full"
    common = {
        "cell": cell,
        "method": cell.split("@")[0],
        "budget": None if full else float(cell.split("@")[1]),
        "compress_at": "context",
        "model": "m",
        "task": task,
        "length": length,
        "answers": ["7"],
        "nbytes": 100 if full else 50,
        "full_nbytes": 100,
        "fixed_nbytes": 0,
        "prompts": "p",
    }
    return [
        common | {"sample_id": f"{task}-{length}-{index:04d}", "score": float(score)} | changes
        for index, score in enumerate(scores)
    ]


def test_cells_gained_and_lost() -> None:
    found = side_by_side(
        rows("full", [1, 1]) + rows("ksvd@0.5", [1, 0]), rows("full", [1, 1]) + rows("kqsvd@0.5", [1, 1, 1, 0])
    )
    assert [row["cell"] for row in found.compared] == ["full"]
    [gained], [lost] = found.gained, found.lost
    assert (gained["cell"], gained["n"], gained["mean"], gained["bytes_ratio"]) == ("kqsvd@0.5", 4, 0.75, 0.5)
    assert (lost["cell"], lost["n"], lost["mean"]) == ("ksvd@0.5", 2, 0.5)
    assert gained["low"] < 0.75 < gained["high"]


def test_the_difference_is_b_minus_a_on_the_samples_of_both() -> None:
    # B has four samples more, all wrong: without pairing it would lose.
    found = side_by_side(rows("ksvd@0.5", [0, 0, 1, 0, 1]), rows("ksvd@0.5", [1, 1, 1, 0, 0, 0, 0, 0, 0]))
    [row] = found.compared
    expected = paired_difference([1, 1, 1, 0, 0], [0, 0, 1, 0, 1])
    assert (row["n"], row["a_lacks"], row["b_lacks"], row["refused"]) == (5, 4, 0, {})
    assert (row["a"], row["b"]) == (0.4, 0.6)
    assert [row["diff"], row["diff_low"], row["diff_high"]] == pytest.approx(
        [expected.mean, expected.low, expected.high]
    )
    assert row["p_value"] == pytest.approx(expected.p_value)


def test_exchanging_the_sides_turns_the_sign() -> None:
    a, b = rows("ksvd@0.5", [0, 0, 1, 0, 1]), rows("ksvd@0.5", [1, 1, 1, 0, 0, 1])
    [there], [back] = side_by_side(a, b).compared, side_by_side(b, a).compared
    assert there["diff"] == pytest.approx(-back["diff"]) and there["diff"] > 0
    assert (there["a_lacks"], there["b_lacks"]) == (back["b_lacks"], back["a_lacks"]) == (1, 0)
    assert (there["a"], there["b"]) == (back["b"], back["a"])


def test_tasks_weigh_the_same_and_stand_by_themselves() -> None:
    a = rows("ksvd@0.5", [0] * 8, "vt") + rows("ksvd@0.5", [1, 1], "cwe")
    b = rows("ksvd@0.5", [1] * 8, "vt") + rows("ksvd@0.5", [1, 1], "cwe")
    [row] = side_by_side(a, b).compared
    assert row["diff"] == pytest.approx(0.5)
    assert {task["task"]: (task["n"], task["diff"]) for task in row["tasks"]} == {"cwe": (2, 0.0), "vt": (8, 1.0)}


def test_lengths_of_a_task_weigh_the_same() -> None:
    a = rows("ksvd@0.5", [0] * 6, length=1024) + rows("ksvd@0.5", [0, 0], length=2048)
    b = rows("ksvd@0.5", [0] * 6, length=1024) + rows("ksvd@0.5", [1, 1], length=2048)
    [row] = side_by_side(a, b).compared
    assert row["diff"] == pytest.approx(0.5) and row["n"] == 8
    assert [(task["task"], task["diff"]) for task in row["tasks"]] == [("vt", 0.5)]


@pytest.mark.parametrize(
    ("changes", "reason"), [({"prompts": "q"}, "other prompts"), ({"answers": ["8"]}, "other references")]
)
def test_other_prompts_are_refused(changes: Row, reason: str) -> None:
    ours, theirs = rows("ksvd@0.5", [0, 1, 1]), rows("ksvd@0.5", [1, 1, 1], **changes)
    found = side_by_side(ours, theirs)
    assert not found.compared
    [row] = found.unpaired
    assert (row["cell"], row["a_n"], row["b_n"], row["refused"]) == ("ksvd@0.5", 3, 3, {reason: 3})
    # Where some samples can be paired, the others are left out and counted.
    [partly] = side_by_side(ours, rows("ksvd@0.5", [1]) + theirs[1:]).compared
    assert (partly["n"], partly["diff"], partly["refused"], partly["a_lacks"]) == (1, 1.0, {reason: 2}, 0)


def test_a_session_of_several_prompts_is_paired_within_each() -> None:
    ours = rows("ksvd@0.5", [0, 0]) + rows("ksvd@0.5", [1, 1], prompts="q")
    theirs = rows("ksvd@0.5", [1, 1]) + rows("ksvd@0.5", [1, 0], prompts="q")
    found = pair(ours, theirs)
    assert len(found.pairs) == 4 and not found.refused
    assert all(first["prompts"] == second["prompts"] for first, second in found.pairs)
    [row] = side_by_side(ours, theirs).compared
    assert (row["n"], row["diff"]) == (4, 0.25)


def test_nothing_in_common_but_the_cell() -> None:
    found = side_by_side(rows("ksvd@0.5", [1], "vt"), rows("ksvd@0.5", [1], "cwe"))
    assert not found.compared
    assert [(row["cell"], row["refused"]) for row in found.unpaired] == [("ksvd@0.5", {})]
    counts = pair(rows("ksvd@0.5", [1], "vt"), rows("ksvd@0.5", [1, 1], "cwe"))
    assert (counts.a_lacks, counts.b_lacks) == (2, 1)


@pytest.mark.parametrize("changes", [{"model": "n"}, {"compress_at": "prompt"}])
def test_another_model_or_moment_is_another_cell(changes: Row) -> None:
    found = side_by_side(rows("full", [1]), rows("full", [1], **changes))
    assert not found.compared and not found.unpaired
    assert len(found.gained) == len(found.lost) == 1


def test_what_changed_in_a_cell_is_named() -> None:
    key = ("m", "context", "ksvd@0.5")
    before = {key: {"code": "1", "method": {"sinks": 0, "rope": "post"}}}
    after = {key: {"code": "2", "method": {"sinks": 4, "rope": "post"}}}
    [row] = side_by_side(rows("ksvd@0.5", [1]), rows("ksvd@0.5", [1]), before, after).compared
    assert row["changed"] == ["code", "method.sinks"]
    assert differing({"a": 1}, {"a": 1, "b": None}) == []


def test_cells_stand_in_the_order_of_the_report() -> None:
    made = [row for cell in ("xkv@0.25", "ksvd@0.5", "full", "ksvd@0.75") for row in rows(cell, [1, 0])]
    found = side_by_side(made, made)
    assert [row["cell"] for row in found.compared] == ["full", "ksvd@0.75", "ksvd@0.5", "xkv@0.25"]
    assert [row["cell"] for row in side_by_side([], made).gained] == ["full", "ksvd@0.75", "ksvd@0.5", "xkv@0.25"]


def test_verdicts() -> None:
    sure = list(np.ones(40))
    for a, b, said in [([0.0] * 40, sure, "better"), (sure, [0.0] * 40, "worse"), (sure, sure, "not settled")]:
        [row] = side_by_side(rows("ksvd@0.5", a), rows("ksvd@0.5", b)).compared
        assert verdict(row) == said
