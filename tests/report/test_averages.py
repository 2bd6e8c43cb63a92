from __future__ import annotations

from typing import Any

import pytest
from kvgauge.report.longbench import longbench_table

from kvgauge.benchmarks.longbench import BUCKETS

HEAD: dict[str, Any] = {
    "cell": "xkv@0.5",
    "method": "xkv",
    "budget": 0.5,
    "compress_at": "context",
    "model": "m",
    "length": 4000,
}


def test_categories_and_their_mean_as_the_paper_prints_them() -> None:
    means = {"hotpotqa": 0.4, "2wikimqa": 0.3, "musique": 0.2, "trec": 0.6, "all": 0.9}
    table = longbench_table([HEAD | {"task": task, "mean": mean} for task, mean in means.items()])
    [row] = table.to_dict("records")
    assert row["language"] == "en"
    assert row["multi_doc_qa"] == "30.00"  # the three English datasets of the category
    assert row["few_shot"] == "60.00*"  # one of three
    assert row["overall"] == "45.00*"
    assert "words" not in table and "code" not in table


def test_longbench_e_has_a_row_per_interval() -> None:
    rows = [
        HEAD | {"task": task, "length": length, "mean": mean}
        for length, mean in [*((bucket.length, 0.1 * number) for number, bucket in enumerate(BUCKETS, 1)), (None, 0.2)]
        for task in ("hotpotqa_e", "2wikimqa_e")
    ]
    table = longbench_table(rows).set_index("words")
    assert list(table.index) == ["0-4k", "4-8k", "8k+", "all"]
    assert list(table["multi_doc_qa"]) == ["10.00", "20.00", "30.00", "20.00"]


@pytest.mark.parametrize("cells", [[], [HEAD | {"task": "niah_single_1", "mean": 1.0}]])
def test_other_benchmarks_have_no_such_table(cells: list[dict[str, Any]]) -> None:
    assert longbench_table(cells).empty
