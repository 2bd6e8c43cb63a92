import pytest

from kvgauge.benchmarks.longbench import prompts
from kvgauge.benchmarks.longbench.datasets import DATASETS
from kvgauge.benchmarks.longbench.prompts import PromptFormat, digest, prompt_formats
from kvgauge.errors import UserError

WITHOUT_INPUT = ("gov_report", "multi_news", "vcsum", "passage_count", "lcc")


@pytest.mark.parametrize("name", DATASETS)
def test_context_comes_first_and_the_input_is_in_the_question(name):
    form = prompt_formats()[name]
    assert form.context("THE CONTEXT").endswith("THE CONTEXT")
    assert form.head
    question = form.question("THE INPUT")
    assert ("THE INPUT" in question) == (name not in WITHOUT_INPUT)
    assert "{{" not in form.context("") + question


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("triviaqa", "\n\n<q>"),
        ("samsum", "\n\n<q>"),
        ("trec", "\n<q>"),
        ("lsht", "\n<q>"),
        ("lcc", "Next line of code:\n"),
        ("repobench-p", "<q>Next line of code:\n"),
    ],
)
def test_whole_question_where_lm_eval_differs_or_might(name, end):
    assert prompt_formats()[name].question("<q>") == end


@pytest.mark.parametrize("name", ["passage_count", "passage_retrieval_en"])
def test_official_blank_at_the_end(name):
    assert prompt_formats()[name].question("").endswith("answer is: ")


def test_braces_in_texts_are_left_alone():
    form = prompt_formats()["hotpotqa"]
    assert "{{question}} {x}" in form.question("{{question}} {x}")
    assert form.context("{{context}} {0}").endswith("{{context}} {0}")


def test_digest_sees_every_character():
    one, other = {"a": PromptFormat("x", "y")}, {"a": PromptFormat("x", "y ")}
    assert digest(one) != digest(other)
    assert digest(one) != digest({"a": PromptFormat("xy", "")})


def test_other_prompts_than_the_official_ones_are_refused(monkeypatch):
    monkeypatch.setattr(prompts, "OFFICIAL_DIGEST", digest({}))
    prompt_formats.cache_clear()
    with pytest.raises(UserError, match="other LongBench prompts than the official ones"):
        prompt_formats()


def test_a_dataset_that_lm_eval_lacks_is_a_user_error():
    with pytest.raises(UserError, match="does not carry LongBench's nq"):
        prompts.task_file("nq")
