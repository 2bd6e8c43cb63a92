import pytest

from kvgauge.benchmarks.longbench import DATASETS, averages
from kvgauge.benchmarks.longbench.datasets import names, task_name
from kvgauge.errors import UserError


def cell(task, mean, length=0, **fields):
    given = {"cell": "kqsvd@0.5", "method": "kqsvd", "budget": 0.5, "compress_at": "context", "model": "m"}
    return given | {"task": task, "length": length, "mean": mean} | fields


def figures(rows, **wanted):
    return {
        (row["language"], row["average"]): row["mean"]
        for row in rows
        if all(row[key] == value for key, value in wanted.items())
    }


# A row of the paper's results of each dataset (GPT-3.5-Turbo-16k, per cent) with the averages printed beside them.
PRINTED = {
    "narrativeqa": 23.6,
    "qasper": 43.3,
    "multifieldqa_en": 52.3,
    "multifieldqa_zh": 61.2,
    "hotpotqa": 51.6,
    "2wikimqa": 37.7,
    "musique": 26.9,
    "dureader": 28.7,
    "gov_report": 29.5,
    "qmsum": 23.4,
    "multi_news": 26.7,
    "vcsum": 16.0,
    "trec": 68.0,
    "triviaqa": 91.4,
    "samsum": 41.7,
    "lsht": 29.2,
    "passage_count": 4.5,
    "passage_retrieval_en": 71.0,
    "passage_retrieval_zh": 77.5,
    "lcc": 54.7,
    "repobench-p": 53.6,
}
PRINTED_AVERAGES = {
    "en": {
        "single_doc_qa": 39.8,
        "multi_doc_qa": 38.7,
        "summarization": 26.5,
        "few_shot": 67.1,
        "code": 54.1,
        "synthetic": 37.8,
        "overall": 44.0,
    },
    "zh": {
        "single_doc_qa": 61.2,
        "multi_doc_qa": 28.7,
        "summarization": 16.0,
        "few_shot": 29.2,
        "code": 54.1,
        "synthetic": 77.5,
        "overall": 44.5,
    },
}


def test_averages_are_those_that_the_authors_print():
    rows = averages(cell(task, mean / 100) for task, mean in PRINTED.items())
    found = figures(rows)
    for language, printed in PRINTED_AVERAGES.items():
        for average, per_cent in printed.items():
            # both sides are rounded to a tenth
            assert 100 * found[language, average] == pytest.approx(per_cent, abs=0.101), (language, average)
    assert all(row["complete"] for row in rows)
    assert found["all", "single_doc_qa"] == pytest.approx((0.236 + 0.433 + 0.523 + 0.612) / 4)


def test_an_average_of_a_part_says_so():
    rows = averages([cell("qasper", 0.2), cell("hotpotqa", 0.6), cell("2wikimqa", 0.8), cell("all", 0.9)])
    assert figures(rows) == pytest.approx(
        {("en", "single_doc_qa"): 0.2, ("en", "multi_doc_qa"): 0.7, ("en", "overall"): 0.45}
    )
    assert not any(row["complete"] for row in rows)
    assert rows[-1]["tasks"] == ["2wikimqa", "hotpotqa", "qasper"]


def test_code_alone_belongs_to_no_language():
    assert figures(averages([cell("lcc", 0.5), cell("repobench-p", 0.7)])) == pytest.approx(
        {("all", "code"): 0.6, ("all", "overall"): 0.6}
    )


def test_e_has_averages_of_each_interval_and_cells_stay_apart():
    tasks = [task_name(name, "e") for name in names("e")]
    rows = averages(
        [cell(task, mean, length) for task in tasks for length, mean in [(4000, 0.8), (8000, 0.5), (None, 0.65)]]
        + [cell(task, 0.9, 4000, cell="full", method="full", budget=None) for task in tasks]
    )
    for name, length, mean in [("kqsvd@0.5", 4000, 0.8), ("kqsvd@0.5", 8000, 0.5), ("kqsvd@0.5", None, 0.65)]:
        found = figures(rows, cell=name, length=length)
        assert list(found.values()) == pytest.approx([mean] * 7)
    assert figures(rows, cell="full")["en", "overall"] == pytest.approx(0.9)
    assert all(row["complete"] for row in rows)
    assert {row["language"] for row in rows} == {"en"}


def test_another_benchmarks_tasks_are_a_user_error():
    assert averages([]) == []
    with pytest.raises(UserError, match="unknown LongBench task 'niah_single_1'"):
        averages([cell("niah_single_1", 1.0)])


def test_every_dataset_is_in_one_average_of_its_language():
    rows = averages(cell(task, 0.5) for task in DATASETS)
    for task, dataset in DATASETS.items():
        languages = ("en", "zh") if dataset.language == "code" else (dataset.language,)
        for language in (*languages, "all"):
            there = [row["average"] for row in rows if row["language"] == language and task in row["tasks"]]
            assert there == [dataset.category, "overall"]
