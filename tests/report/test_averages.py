"""The tables of benchmarks' own averages, from the rows that the evaluate stage writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kvgauge.benchmarks.longbench import BUCKETS, averages
from kvgauge.errors import UserError
from kvgauge.report import build_report
from kvgauge.report.averages import averages_tables
from kvgauge.report.collect import collect

Row = dict[str, Any]

HEAD: Row = {
    "cell": "xkv@0.5",
    "method": "xkv",
    "budget": 0.5,
    "compress_at": "context",
    "model": "m",
    "length": 4000,
}


def row(average: str, mean: float, n: int = 8, **more: Any) -> Row:
    return HEAD | {"benchmark": "recital", "average": average, "mean": mean, "n": n} | more


def longbench_table(cells: list[Row]) -> pd.DataFrame:
    tables = averages_tables([[found | {"benchmark": "longbench", "n": 5} for found in averages(cells)]])
    assert list(tables) == ["longbench"]
    return tables["longbench"]


def test_categories_and_their_mean_as_the_paper_prints_them() -> None:
    means = {"hotpotqa": 0.4, "2wikimqa": 0.3, "musique": 0.2, "trec": 0.6, "all": 0.9}
    table = longbench_table([HEAD | {"task": task, "mean": mean} for task, mean in means.items()])
    [line] = table.to_dict("records")
    assert line["language"] == "en"
    assert line["multi_doc_qa"] == "30.00"  # the three English datasets of the category
    assert line["few_shot"] == "60.00*"  # one of three
    assert line["overall"] == "45.00*"
    assert list(table) == [
        "cell",
        "method",
        "budget",
        "compress_at",
        "model",
        "language",
        *("multi_doc_qa", "few_shot", "overall"),
    ]


def test_longbench_e_has_a_row_per_interval() -> None:
    rows = [
        HEAD | {"task": task, "length": length, "mean": mean}
        for length, mean in [*((bucket.length, 0.1 * number) for number, bucket in enumerate(BUCKETS, 1)), (None, 0.2)]
        for task in ("hotpotqa_e", "2wikimqa_e")
    ]
    table = longbench_table(rows).set_index("words")
    assert list(table.index) == ["0-4k", "4-8k", "8k+", "all"]
    assert list(table["multi_doc_qa"]) == ["10.00", "20.00", "30.00", "20.00"]
    assert "length" not in table


def test_no_averages_no_table() -> None:
    assert averages_tables([]) == averages_tables([[]]) == {}


def test_every_benchmark_has_a_table_and_an_overall_figure_stays_last() -> None:
    first = [row("prose", 0.5), row("overall", 0.5), row("verse", 1.0, benchmark="other", complete=False)]
    second = [row("verse", 0.25, cell="full"), row("overall", 0.25, cell="full")]
    tables = averages_tables([first, second])
    assert list(tables) == ["recital", "other"]
    assert list(tables["recital"])[-3:] == ["prose", "verse", "overall"]
    assert tables["recital"]["overall"].tolist() == ["50.00", "25.00"]
    assert tables["recital"]["prose"].isna().tolist() == [False, True]
    assert tables["other"]["verse"].tolist() == ["100.00*"]


def test_lengths_and_samples_stand_there_where_rows_would_look_alike() -> None:
    lengths = [row("overall", 0.5, length=length) for length in (1024, 2048, None)]
    table = averages_tables([lengths])["recital"]
    assert table["length"].tolist()[:2] == [1024, 2048] and "n" not in table
    few, many = [row("overall", 0.5)], [row("overall", 0.75, n=20)]
    table = averages_tables([few, many])["recital"]
    assert (table["n"].tolist(), table["overall"].tolist()) == ([8, 20], ["50.00", "75.00"])
    assert "length" not in table
    assert len(averages_tables([few, few])["recital"]) == 1


def test_what_is_no_single_value_tells_no_rows_apart() -> None:
    [line] = averages_tables([[row("a", 0.1, tasks=["x"], weights=[1, 2]), row("b", 0.2, weights=[3])]])[
        "recital"
    ].to_dict("records")
    assert (line["a"], line["b"]) == ("10.00", "20.00")


@pytest.fixture
def evaluated(
    tmp_path: Path, make_samples: Callable[..., list[Row]], write_evaluate: Callable[[Path, list[Row]], Path]
) -> Path:
    """Results of a benchmark with averages of two tasks and of all, at one length and over both."""
    directory = write_evaluate(tmp_path / "evaluate", make_samples(("xkv",), (0.5,), (512, 1024), 3))
    setting = HEAD | {"model": "smollm2-135m", "benchmark": "recital"}
    rows = [
        setting | {"average": "questions", "mean": 0.5, "length": 512, "tasks": ["vt", "qa_1"], "complete": False},
        setting | {"average": "overall", "mean": 0.25, "length": 512},
        setting | {"average": "overall", "mean": 0.125, "length": None},
    ]
    (directory / "averages.json").write_text(json.dumps(rows))
    return directory


def test_rows_are_read_with_the_number_of_their_samples(evaluated: Path) -> None:
    [rows] = collect([evaluated]).averages
    assert [found["n"] for found in rows] == [2 * 3, 5 * 3, 2 * 5 * 3]


def test_the_report_has_the_table(evaluated: Path, tmp_path: Path) -> None:
    index = build_report([evaluated], [], [], out_dir=tmp_path / "out", provenance={})
    assert "Averages" in index.read_text() and "recital" in index.read_text()
    table = pd.read_csv(index.parent / "averages-recital.csv", dtype=str)
    assert table[["length", "questions", "overall"]].fillna("").to_numpy().tolist() == [
        ["512.0", "50.00*", "25.00"],
        ["", "", "12.50"],
    ]
    assert "50.00*" in (index.parent / "averages-recital.md").read_text()


def test_averages_from_before_they_had_a_name_have_a_table_too(evaluated: Path, tmp_path: Path) -> None:
    path = evaluated / "averages.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([{key: value for key, value in found.items() if key != "benchmark"} for found in rows]))
    index = build_report([evaluated], [], [], out_dir=tmp_path / "out", provenance={})
    assert len(pd.read_csv(index.parent / "averages.csv")) == 2


def test_a_row_that_lacks_its_mean_is_refused(evaluated: Path) -> None:
    path = evaluated / "averages.json"
    rows = json.loads(path.read_text())
    del rows[1]["mean"]
    path.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"row 2 of .*averages.json has no mean: run the evaluate stage again"):
        collect([evaluated])
