import json

import pytest

from kvgauge.benchmarks.longbench import DATASETS, LongBench, score
from kvgauge.benchmarks.longbench.datasets import EDITIONS, file_name, names, task_name
from kvgauge.benchmarks.longbench.prompts import prompt_formats
from kvgauge.benchmarks.longbench.rows import Files
from kvgauge.prompts.encoding import Template, encode
from kvgauge.prompts.samples import Sample

TASKS = [(edition, name) for edition in EDITIONS for name in names(edition)]
FIELDS = {"id", "task", "context", "question", "answer_prefix", "answers", "max_new_tokens", "length", "tokens", "chat"}
FACTS = {"dataset", "category", "language", "words", "bucket", "whole_tokens", "truncated", "all_classes", "source_id"}
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[answer]"


@pytest.fixture
def prompts(directory, counter):
    def make(**fields):
        return list(LongBench(**{"source": str(directory)} | fields).prompts(counter))

    return make


@pytest.mark.parametrize(("edition", "name"), TASKS)
def test_every_dataset_from_its_file_to_a_score(prompts, directory, counter, edition, name):
    counter.tokenizer.chat_template = TEMPLATE
    task, dataset, form = task_name(name, edition), DATASETS[name], prompt_formats()[name]
    file = file_name(name, edition)
    rows = Files(str(directory), [file]).rows(file)
    samples = prompts(tasks=[name], edition=edition)
    assert [sample.id for sample in samples] == [f"{task}-{index:04d}" for index in range(len(rows))]
    for sample, row in zip(samples, rows, strict=True):
        assert sample.context == form.head + row.context
        assert sample.question == form.question(row.input)
        assert (sample.answer_prefix, sample.task, sample.answers) == ("", task, row.answers)
        assert sample.max_new_tokens == dataset.max_new_tokens
        assert sample.chat == (dataset.category not in ("few_shot", "code"))
        template = Template.of(counter.tokenizer, sample.chat)
        prompt = encode(counter.tokenizer, template, sample.context, sample.question)
        assert sample.tokens == sample.facts["whole_tokens"] == prompt.tokens + dataset.max_new_tokens
        assert not sample.facts["truncated"]
        for answer in row.answers:
            # what follows the first line counts in neither few-shot learning nor code
            more = "\nQuestion: Food" if not dataset.chat else ""
            assert score(task, answer + more, row.answers, row.all_classes) == pytest.approx(1)
        assert score(task, "zebra 99", row.answers, row.all_classes) < 0.3
        assert score(task, "", row.answers, row.all_classes) == 0
        line = json.loads(json.dumps(sample.to_dict()))
        assert line["answers"] == list(row.answers)
        assert line["all_classes"] == (None if row.all_classes is None else list(row.all_classes))
        assert set(line) == FIELDS | FACTS
        assert Sample.of(line) == sample


def test_ids_are_unique_and_ascii(prompts):
    ids = [sample.id for edition in EDITIONS for sample in prompts(edition=edition)]
    assert len(ids) == len(set(ids)) > 21 + 13
    assert all(sample_id.isascii() for sample_id in ids)


def test_results_are_grouped_by_bucket_in_e_and_by_limit_otherwise(prompts):
    assert [
        (sample.facts["words"], sample.facts["bucket"], sample.length) for sample in prompts(tasks=["lcc"], edition="e")
    ] == [
        (1200, "0-4k", 4000),
        (4000, "4-8k", 8000),
        (9100, "8k+", 16000),
    ]
    assert {(sample.facts["bucket"], sample.length) for sample in prompts(tasks=["lcc"])} == {(None, 0)}
    limited = prompts(tasks=["lcc"], max_length=900)
    assert {(sample.facts["bucket"], sample.length) for sample in limited} == {(None, 900)}


def test_long_prompts_lose_their_middle_and_only_they(prompts):
    whole = {sample.id: sample for sample in prompts()}
    limited = prompts(max_length=900)
    assert {sample.facts["truncated"] for sample in limited} == {True, False}
    for sample in limited:
        before = whole[sample.id]
        assert sample.tokens <= 900
        assert sample.facts["whole_tokens"] == before.tokens
        assert sample.facts["truncated"] == (before.tokens > 900)
        assert sample.question == before.question
        if sample.facts["truncated"]:
            assert sample.tokens >= 898
            assert len(sample.context) < len(before.context)
            assert sample.context[:150] == before.context[:150]
        else:
            assert sample.context == before.context


def test_more_samples_add_to_those_there_are(prompts, directory):
    one, two, three = ([sample.id for sample in prompts(tasks=["qasper"], samples=count)] for count in (1, 2, 3))
    assert two[:1] == one and three[:2] == two and len(three) == 3
    assert [sample.id for sample in prompts(tasks=["qasper"], samples=99)] == three
    drawn = {tuple(sample.id for sample in prompts(tasks=["qasper"], samples=3, seed=seed)) for seed in range(10)}
    assert len(drawn) > 1


def test_without_chat_no_prompt_has_the_template(prompts, counter):
    counter.tokenizer.chat_template = TEMPLATE
    plain, chat = prompts(tasks=["qasper", "lcc"], chat=False), prompts(tasks=["qasper", "lcc"])
    assert not any(sample.chat for sample in plain)
    added = len("[user][answer]")
    for sample, other in zip(plain, chat, strict=True):
        assert other.tokens - sample.tokens == (added if other.facts["dataset"] == "qasper" else 0)
