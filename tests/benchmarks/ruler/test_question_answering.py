from dataclasses import replace

import pytest

from kvgauge.benchmarks.ruler import TASKS, generate
from kvgauge.benchmarks.ruler.spec import Draw
from kvgauge.errors import UserError


def asked(data, sample):
    """The question of a sample and its position in the data."""
    query = sample.question.split("Question: ")[1]
    return next(question for question in data.questions if question.query == query)


@pytest.mark.parametrize("length", [2048, 4096])
@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_gold_documents_are_whole_where_they_fit(task, length, prompt_length, sources):
    data = sources.squad if task == "qa_1" else sources.hotpotqa
    for sample in generate(task, length, 4, 1, prompt_length, sources):
        question = asked(data, sample)
        assert sample.answers == question.answers
        for document in question.gold:
            assert data.documents[document].strip() in sample.context


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_the_evidence_survives_trimming(task, prompt_length, sources):
    data = sources.squad if task == "qa_1" else sources.hotpotqa
    for sample in generate(task, 512, 8, 1, prompt_length, sources):
        for part in asked(data, sample).evidence:
            assert data.documents[part.document][part.start : part.end].strip() in sample.context


def test_documents_are_distinct_and_numbered_and_gold_is_not_always_first(prompt_length, sources):
    data = sources.squad
    first = 0
    for sample in generate("qa_1", 2048, 8, 1, prompt_length, sources):
        listed = sample.context.split("Document ")[1:]
        assert [int(text.split(":")[0]) for text in listed] == list(range(1, len(listed) + 1))
        assert len({text.split("\n", 1)[1] for text in listed}) == len(listed) > 2
        first += data.documents[asked(data, sample).gold[0]] in listed[0]
    assert first < 8


def test_more_samples_than_questions_is_a_user_error(prompt_length, sources, monkeypatch):
    data = sources.squad
    small = replace(data, questions=data.questions[:1])
    monkeypatch.setattr(sources, "squad", small)
    with pytest.raises(UserError, match="has 1 questions, sample 2 was asked for"):
        list(generate("qa_1", 2048, 2, 0, prompt_length, sources))


def test_no_question_is_asked_twice(sources):
    order = [
        next(TASKS["qa_1"].drafts(Draw("qa_1", 512, index, 0, sources))).question for index in (*range(6), 300, 5927)
    ]
    assert len(set(order)) == 8
