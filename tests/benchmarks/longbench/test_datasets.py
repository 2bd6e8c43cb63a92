import pytest

from kvgauge.benchmarks.longbench.datasets import CATEGORIES, DATASETS, dataset_of, names
from kvgauge.benchmarks.longbench.prompts import task_file
from kvgauge.errors import UserError

# What lm-eval calls the official metrics.
FUNCTIONS = {
    "qa_f1": "qa_f1",
    "qa_f1_zh": "qa_f1_zh",
    "rouge_l": "rouge",
    "rouge_l_zh": "rouge_zh",
    "classification": "classification",
    "retrieval": "retrieval",
    "retrieval_zh": "retrieval_zh",
    "count": "count",
    "code_sim": "code_sim",
}


def test_editions_have_21_and_13_datasets_in_six_categories():
    assert len(names("standard")) == 21
    assert len(names("e")) == 13
    assert {dataset.category for dataset in DATASETS.values()} == set(CATEGORIES)
    assert [sum(dataset.category == category for dataset in DATASETS.values()) for category in CATEGORIES] == [
        4,
        4,
        4,
        4,
        3,
        2,
    ]
    assert [name for name, dataset in DATASETS.items() if dataset.language == "zh"] == [
        "multifieldqa_zh",
        "dureader",
        "vcsum",
        "lsht",
        "passage_retrieval_zh",
    ]


def test_chat_exceptions_and_first_line_tasks_are_the_official_ones():
    plain = [name for name, dataset in DATASETS.items() if not dataset.chat]
    assert plain == ["trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"]
    assert [name for name, dataset in DATASETS.items() if dataset.first_line_only] == plain[:4]


@pytest.mark.parametrize("name", DATASETS)
def test_metric_and_answer_length_agree_with_lm_eval(name):
    task = task_file(name)
    assert DATASETS[name].max_new_tokens == task["generation_kwargs"]["max_gen_toks"]
    assert task["process_results"] == f"metrics.get_{FUNCTIONS[DATASETS[name].metric]}_with_score"


@pytest.mark.parametrize(
    ("task", "name"),
    [("qasper", "qasper"), ("qasper_e", "qasper"), ("repobench-p_e", "repobench-p"), ("trec_stand_in", "trec")],
)
def test_dataset_of_a_task_of_any_edition(task, name):
    assert dataset_of(task).name == name


@pytest.mark.parametrize("task", ["qaspr", "musique_e", "qasper_stand_in", "_e", ""])
def test_unknown_task_is_a_user_error(task):
    with pytest.raises(UserError, match=f"unknown LongBench task '{task}'"):
        dataset_of(task)
