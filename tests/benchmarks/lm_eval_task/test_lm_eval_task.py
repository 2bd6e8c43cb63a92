"""Prompts, splits and refusals of lm-eval's tasks as a benchmark."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import kvgauge
from kvgauge import configuration
from kvgauge.benchmarks.lm_eval_task import LmEval
from kvgauge.benchmarks.lm_eval_task.loading import load_tasks
from kvgauge.benchmarks.lm_eval_task.prompts import chat_template
from kvgauge.benchmarks.lm_eval_task.splitting import split
from kvgauge.errors import UserError
from kvgauge.prompts.choices import as_text, of_text
from kvgauge.prompts.encoding import Template, encode, encode_choices
from kvgauge.prompts.length import TokenCounter
from kvgauge.prompts.samples import Sample

TOKENIZERS = ("tiny/llama", "smollm2-135m")


def benchmark(folder: Path | str | None, *tasks: str, **options) -> LmEval:
    node = configuration.read("benchmark", "lm_eval")
    return configuration.build(
        node, "benchmark", tasks=list(tasks), include_path=None if folder is None else str(folder), **options
    )


def samples(of: LmEval, tokenizer: str = "tiny/llama") -> list[Sample]:
    return list(of.prompts(TokenCounter(kvgauge.load_tokenizer(tokenizer), chat=of.chat)))


def requests(folder: Path, task: str):
    loaded = TaskManager(include_path=str(folder), include_defaults=False).load([task])["tasks"][task]
    if loaded.config.num_fewshot is None:
        loaded.set_config("num_fewshot", 0)
    loaded.set_fewshot_seed(1234)
    loaded.build_all_requests()
    return loaded.instances


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("task", ["say_colour", "say_context", "sampled"])
def test_generation_prompts_are_lm_evals_to_the_token(task_files, tokenizer, task):
    made = samples(benchmark(task_files, task, as_run=True), tokenizer)
    tokens = kvgauge.load_tokenizer(tokenizer)
    found = requests(task_files, task)
    assert len(made) == len(found) == 4
    for sample, request in zip(made, found, strict=True):
        assert sample.context + sample.question == request.args[0]
        assert list(sample.stop) == request.args[1]["until"]
        assert sample.max_new_tokens == request.args[1]["max_gen_toks"]
        prompt = encode(tokens, Template.of(tokens, False), sample.context, sample.question)
        assert [*prompt.context[0].tolist(), *prompt.question[0].tolist()] == tokens(request.args[0]).input_ids
        assert Sample.of(json.loads(json.dumps(sample.to_dict()))) == sample


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("task", ["choose_colour", "choose_thing", "last_word"])
def test_scored_texts_have_lm_evals_tokens(task_files, tokenizer, task):
    made, tokens = samples(benchmark(task_files, task), tokenizer), kvgauge.load_tokenizer(tokenizer)
    found = requests(task_files, task)
    for sample in made:
        own = [request for request in found if request.doc_id == sample.facts["document"]]
        choices = encode_choices(tokens, Template.of(tokens, False), sample.question, "", sample.choices)
        prompt = encode(tokens, Template.of(tokens, False), sample.context, sample.question)
        for request, choice in zip(own, choices, strict=True):
            context, continuation = request.args
            before = tokens(context).input_ids
            assert [*prompt.context[0].tolist(), *prompt.question[0].tolist(), *choice.rest] == before
            assert list(choice.text) == tokens(context + continuation).input_ids[len(before) :]
        behind = max(len(choice.rest) + len(choice.text) for choice in choices)
        assert behind <= sample.max_new_tokens + 1 <= behind + 2
        assert Sample.of(json.loads(json.dumps(sample.to_dict()))) == sample


@pytest.mark.parametrize("task", ["say_colour", "choose_colour"])
def test_chats_are_rendered_as_by_lm_evals_own_model(task_files, task):
    tokens = kvgauge.load_tokenizer("smollm2-135m")
    model = SimpleNamespace(tokenizer=tokens, chat_template_args={})
    loaded = load_tasks([task], str(task_files), None, 1234)[task]
    loaded.build_all_requests(
        apply_chat_template=True, fewshot_as_multiturn=True, chat_template=partial(HFLM.apply_chat_template, model)
    )
    texts = {request.doc_id: request.args[0] for request in loaded.instances}
    made = samples(benchmark(task_files, task, chat=True), "smollm2-135m")
    assert len(made) == 4
    for sample in made:
        whole = texts[sample.facts["document"]]
        assert sample.context + sample.question == (whole if task == "say_colour" else whole.rstrip())
        assert "<|im_start|>" in whole and sample.chat is False


def test_a_template_that_refuses_system_messages_gets_none():
    tokens = kvgauge.load_tokenizer("smollm2-135m")
    tokens.chat_template = (
        "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "[{{ message.content }}]{% endfor %}"
    )
    render = chat_template(tokens)
    assert render([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]) == "[b]"


def test_the_context_is_what_the_task_says(task_files):
    for sample in samples(benchmark(task_files, "say_context")):
        assert sample.context.endswith(".") and sample.question.startswith("\nWhat colour")
        assert sample.facts["split"] == "the context is what the task's metadata names"
    for sample in samples(benchmark(task_files, "say_colour", tail=5)):
        assert sample.question == "swer:"  # a byte is a token of this model
        assert sample.facts["split"] == "the last 5 tokens are the question"


def test_a_field_called_context_is_one(tmp_path):
    rows = [{"context": "The sky is blue. " * 4, "question": "What is the sky?", "answer": "blue"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "asked_of_context",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "Read: {{context}}\n{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "task.yaml").write_text(json.dumps(task))
    [sample] = samples(benchmark(tmp_path, "asked_of_context"))
    assert sample.question.strip() == "What is the sky?" and sample.context.startswith("Read: The sky")
    assert sample.facts["split"] == "the context is the document's field context"
    assert sample.max_new_tokens == 256  # lm-eval's where a task says nothing


def test_a_cut_stands_where_the_tokens_stay_the_same():
    tokens = kvgauge.load_tokenizer("smollm2-135m")
    # the text ends inside a word for one token back, so that the cut goes further
    parts = split(tokens, ["It was the incomprehensibility"], [], tail=1)
    context, question = (tokens(text, add_special_tokens=False).input_ids for text in (parts.context, parts.question))
    assert parts.exact and context + question == tokens("It was the incomprehensibility").input_ids
    assert len(question) >= 1 and context


def test_the_beginning_is_left_out_where_a_prompt_is_too_long(task_files):
    whole = samples(benchmark(task_files, "say_colour"))
    made = samples(benchmark(task_files, "say_colour", max_length=120))
    for sample, long in zip(made, whole, strict=True):
        text = sample.context + sample.question
        assert (long.context + long.question).endswith(text) and len(text) == 120 - 12
        assert sample.facts["truncated"] and not long.facts["truncated"] and sample.length == 120


def test_more_documents_add_to_those_there_are(task_files):
    assert samples(benchmark(task_files, "say_colour", samples=2)) == samples(benchmark(task_files, "say_colour"))[:2]


def test_scores_are_lm_evals_by_filter_and_metric(task_files):
    of = benchmark(task_files, "say_colour")
    sample = samples(of)[0]
    assert sample.answers == ("red",)
    assert of.score(sample, " Red it is") == 1.0 and of.score(sample, " It is red") == 0.0
    assert of.score(sample, " red\n\nblue") == 1.0
    assert of.details(sample, " Red it is")["exact_match,first-word"] == 1.0
    assert of.details(sample, " Red it is")["exact_match,whole"] == 0.0
    assert benchmark(task_files, "say_colour", filter="whole").score(sample, "Red") == 1.0
    assert of.kind("say_colour") == "generation"


def test_choices_are_scored_by_acc_and_acc_norm(task_files):
    of = benchmark(task_files, "choose_colour")
    sample = samples(of)[2]
    assert sample.answers == ("green",) and of.kind("choose_colour") == "likelihood"
    answer = as_text([(-2.0, False), (-3.0, False), (-2.5, True), (-2.6, False)])
    assert of_text(answer)[2] == (-2.5, True)
    assert of.details(sample, answer) == {"acc,none": 0.0, "acc_norm,none": 1.0}  # per letter "green" is the likeliest
    assert of.score(sample, answer) == 0.0
    assert benchmark(task_files, "choose_colour", metric="acc_norm").score(sample, answer) == 1.0


def test_what_the_prompts_depend_on_follows_the_files(tmp_path, task_files):
    for path in task_files.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first = benchmark(tmp_path, "say_colour").identity()
    assert first == benchmark(tmp_path, "say_colour").identity() and first["lm_eval"]
    with (tmp_path / "test.jsonl").open("a") as stream:
        stream.write("\n")
    assert benchmark(tmp_path, "say_colour").identity() != first


def test_a_document_that_changed_is_told(tmp_path, task_files):
    of = benchmark(task_files, "say_colour")
    sample = samples(of)[0]
    changed = Sample.of(sample.to_dict() | {"document_hash": "other"})
    with pytest.raises(UserError, match="not the one that its prompt was made of"):
        of.score(changed, "red")


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        (["say_color"], {}, "unknown lm-eval task 'say_color'.*did you mean 'say_colour'"),
        (["whole_text"], {}, "whole_text has neither generation nor likelihood of a continuation"),
        (["sampled"], {}, r"wants its answers sampled \(temperature 0.7\): set benchmark.as_run=true"),
        (["voted"], {}, "takes 8 answers to a question together"),
        ([], {}, "needs tasks: name some"),
        (["say_colour"], {"tail": 0}, "tail is 0"),
        (["say_colour"], {"max_length": 12}, "leaves no room for a prompt"),
        (["say_colour"], {"samples": 0}, "samples is 0"),
    ],
)
def test_what_cannot_be_is_one_line(task_files, tasks, options, message):
    with pytest.raises(UserError, match=message) as refusal:
        samples(benchmark(task_files, *tasks, **options))
    assert "\n" not in str(refusal.value)


def test_missing_files_are_one_line(tmp_path, task_files):
    with pytest.raises(UserError, match=r"there is no directory '.*nowhere'"):
        benchmark(tmp_path / "nowhere", "say_colour")
    task = json.loads((task_files / "say_colour.yaml").read_text())
    task["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "lost.jsonl")
    (tmp_path / "task.yaml").write_text(json.dumps(task))
    with pytest.raises(UserError, match=r"cannot load task say_colour .*lost\.jsonl"):
        samples(benchmark(tmp_path, "say_colour"))


@pytest.mark.parametrize(("metric", "filter", "message"), [
    ("bleu", None, "has no metric 'bleu' .*set benchmark.metric to one of exact_match"),
    (None, "third", "has no filter 'third': set benchmark.filter to one of first-word, whole"),
])  # fmt: skip
def test_unknown_metrics_and_filters_are_one_line(task_files, metric, filter, message):
    of = benchmark(task_files, "say_colour", metric=metric, filter=filter)
    with pytest.raises(UserError, match=message):
        of.score(samples(of)[0], "red")
