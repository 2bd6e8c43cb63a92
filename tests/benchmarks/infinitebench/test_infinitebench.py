"""InfiniteBench: its schema on rows made here, prompts and scores of every task, and the stand-in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import kvgauge
from kvgauge import configuration
from kvgauge.benchmarks.infinitebench import InfiniteBench
from kvgauge.benchmarks.infinitebench.stand_in import MAKERS, main
from kvgauge.benchmarks.infinitebench.tasks import TASKS
from kvgauge.contract.benchmark import AVERAGE_KEYS
from kvgauge.errors import UserError
from kvgauge.prompts.length import TokenCounter
from kvgauge.prompts.samples import Sample

BOOK = "The tower was built in 1889 by Stephen. It stands in Paris. " * 30
# For each task a row, an answer that is right, one that is wrong, and what stands in its prompt behind the text.
ROWS = {
    "passkey": ({"input": "What is the pass key?", "answer": ["71432"]}, "71432.", "71433", "What is the pass key?"),
    "number_string": ({"input": "What is the sequence?", "answer": ["0011"]}, " it is 0011", "11", "What is the seq"),
    "kv_retrieval": ({"input": 'Key: "a"', "answer": ["b-1"]}, '"b-1"', "b-12", 'Key: "a"'),
    "longbook_sum_eng": ({"input": "", "answer": ["A tower in Paris."]}, "A tower in Paris.", "nothing", ""),
    "longbook_qa_eng": ({"input": "Who?", "answer": ["Stephen", "Steve"]}, "The Stephen!", "Ann", "Be very concise."),
    "longbook_qa_chn": ({"input": "谁？", "answer": ["史蒂芬"]}, "史蒂芬。", "安", "请尽量简短地回答。"),
    "longbook_choice_eng": (
        {"input": "Who?", "answer": ["Stephen"], "options": ["Ann", "Stephen", "Bob", "Cleo"]},
        "B",
        "C",
        "D. Cleo",
    ),
    "longdialogue_qa_eng": ({"input": "", "answer": ["STEPHEN"]}, "Stephen", "Ann", "End of dialogue."),
    "code_debug": (
        {"input": "", "answer": ["f.b"], "options": ["f.a", "f.b", "f.c", "f.d"]},
        "B",
        "A",
        "Which funtion has deliberate error?",
    ),
    "code_run": ({"input": "What is func_3(-2)?", "answer": ["7"]}, "It is 7", "8", "value of func_3(-2)."),
    "math_find": ({"input": "The largest number of the list is: ", "answer": ["98"]}, "98", "97", "The largest number"),
}


def write(folder: Path, names=tuple(TASKS)) -> Path:
    for name in names:
        rows = [{"id": number, "context": BOOK, "options": [], **ROWS[name][0]} for number in range(3)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("infinitebench"))


@pytest.fixture(scope="module")
def counter() -> TokenCounter:
    return TokenCounter(kvgauge.load_tokenizer("smollm2-135m"), chat=True)


def build(source: Path | str, name: str = "infinitebench", **options) -> InfiniteBench:
    return configuration.build(configuration.read("benchmark", name), "benchmark", source=str(source), **options)


def test_every_task_has_a_row_here():
    assert set(ROWS) == set(TASKS) and len(TASKS) == 11


@pytest.mark.parametrize("name", list(TASKS))
def test_rows_become_prompts_and_answers_are_scored(folder, counter, name):
    of = build(folder, tasks=[name])
    samples = list(of.prompts(counter))
    _, right, wrong, behind = ROWS[name]
    assert len(samples) == 3
    for sample in samples:
        assert sample.context.endswith(BOOK) and behind in sample.question and sample.task == name
        assert sample.max_new_tokens == TASKS[name].max_new_tokens
        assert Sample.of(json.loads(json.dumps(sample.to_dict()))) == sample
        assert of.score(sample, right) == 1.0 and of.score(sample, wrong) < 0.2
    assert of.kind(name) == TASKS[name].kind


def test_the_whole_prompt_is_lm_evals(folder, counter):
    from lm_eval.tasks.infinitebench import utils

    row = {"context": BOOK, **ROWS["longbook_choice_eng"][0]}
    [sample, *_] = build(folder, tasks=["longbook_choice_eng"]).prompts(counter)
    assert sample.context + sample.question == utils.doc_to_text_longbook_choice(row)


def test_long_texts_lose_their_middle_and_fewer_samples_are_among_more(folder, counter):
    for sample in build(folder, tasks=["passkey"], max_length=200).prompts(counter):
        assert sample.tokens <= 200 and sample.facts["truncated"] and sample.length == 200
        assert sample.question.endswith("What is the pass key?")
    few = {sample.id for sample in build(folder, tasks=["passkey"], samples=1).prompts(counter)}
    assert few < {sample.id for sample in build(folder, tasks=["passkey"], samples=2).prompts(counter)}
    assert build(folder).overlong == "truncate"


def test_the_average_is_the_mean_of_the_tasks(folder):
    setting = {"cell": "full", "method": "full", "budget": None, "compress_at": "context", "model": "m", "length": 0}
    cells = [setting | {"task": task, "mean": mean} for task, mean in {"passkey": 1.0, "code_run": 0.0}.items()]
    [row] = build(folder).averages(cells)
    assert all(key in row for key in AVERAGE_KEYS) and row["mean"] == 0.5 and row["complete"] is False


def test_missing_and_damaged_files_are_one_line(tmp_path, counter):
    write(tmp_path, ["passkey"])
    with pytest.raises(UserError, match=r"missing in .*: code_run\.jsonl, math_find\.jsonl: get the files"):
        list(build(tmp_path, tasks=["passkey", "code_run", "math_find"]).prompts(counter))
    with pytest.raises(UserError, match="did you mean 'passkey'"):
        build(tmp_path, tasks=["passkeys"])
    bad = {"id": 0, "context": BOOK, "input": "?", "answer": ["x"], "options": ["a"]}
    (tmp_path / "code_debug.jsonl").write_text(json.dumps(bad))
    with pytest.raises(UserError, match=r"row 1 of InfiniteBench file code_debug\.jsonl .*options are not four"):
        list(build(tmp_path, tasks=["code_debug"]).prompts(counter))
    (tmp_path / "passkey.jsonl").write_text("{\n")
    with pytest.raises(UserError, match=r"passkey\.jsonl is damaged"):
        list(build(tmp_path, tasks=["passkey"]).prompts(counter))
    with pytest.raises(UserError, match=r"cannot get passkey\.jsonl of xinrongzhang2022/InfiniteBench"):
        list(build("hub", tasks=["passkey"]).prompts(counter))


def test_the_stand_in_makes_rows_that_its_own_answers_solve(tmp_path, counter):
    main([str(tmp_path), "--words", "150", "--samples", "3"])
    of = build(tmp_path, "infinitebench_stand_in")
    assert set(of.tasks) == set(MAKERS)
    samples = list(of.prompts(counter))
    assert len(samples) == 3 * len(MAKERS)
    for sample in samples:
        assert sample.task.endswith("_stand_in") and 100 < sample.tokens < 900
        options = sample.facts["options"]
        answer = "ABCD"[options.index(sample.answers[0])] if options else sample.answers[0]
        assert of.score(sample, answer) == 1.0, sample.task
        if not sample.task.startswith(("longbook", "code_run", "math_find")):
            assert sample.answers[0] in sample.context
    again = tmp_path / "again"
    main([str(again), "--words", "150", "--samples", "2"])
    for name in MAKERS:
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert (again / f"{name}.jsonl").read_text().splitlines() == lines[:2]
    with pytest.raises(UserError, match="unknown task of benchmark infinitebench_stand_in 'code_debug'"):
        build(tmp_path, "infinitebench_stand_in", tasks=["code_debug"])


def test_nested_calls_have_the_value_that_python_gives(tmp_path, counter):
    main([str(tmp_path), "--words", "150", "--samples", "4"])
    for line in (tmp_path / "code_run.jsonl").read_text().splitlines():
        row, scope = json.loads(line), {}
        exec(row["context"], scope)
        assert str(eval(row["input"].removesuffix(".").rpartition(" ")[2], scope)) == row["answer"][0]
