import pytest

from kvgauge import configuration
from kvgauge.benchmarks.longbench import DATASETS, LongBench
from kvgauge.benchmarks.longbench.datasets import EDITIONS
from kvgauge.errors import UserError
from kvgauge.prompts.samples import Sample


@pytest.mark.parametrize(("name", "edition", "datasets"), [("longbench", "standard", 21), ("longbench_e", "e", 13)])
def test_configuration_files(name, edition, datasets):
    config = configuration.build(configuration.read("benchmark", name), "benchmark")
    assert isinstance(config, LongBench)
    assert (config.name, config.edition, len(config.tasks)) == (name, edition, datasets)
    assert config.samples is None and config.max_length is None and config.total is None


def test_all_means_all_of_the_edition_in_order():
    assert LongBench().tasks == tuple(DATASETS)
    assert LongBench(tasks="qasper").tasks == ("qasper",)
    assert "musique" not in LongBench(edition="e").tasks


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": ["qaspr"]}, "did you mean 'qasper'"),
        ({"tasks": ["musique"], "edition": "e"}, r"unknown LongBench dataset \(edition e\) 'musique'"),
        ({"tasks": []}, "at least one dataset"),
        ({"edition": "E"}, "unknown LongBench edition 'E'"),
        ({"samples": 0}, "samples is 0"),
        ({"max_length": -1}, "max_length is -1"),
    ],
)
def test_bad_values_are_user_errors(fields, message):
    with pytest.raises(UserError, match=message):
        LongBench(**fields)


def test_it_is_scored_by_its_own_metrics():
    facts = {"all_classes": ["Food", "Sport"]}
    fields = {"context": "c", "question": "q", "answers": ("Food",), "max_new_tokens": 8, "length": 0, "facts": facts}
    question = Sample(id="trec-0000", task="trec", **fields)
    assert LongBench().score(question, "Food\nSport") == 1.0
    assert LongBench().score(question, "Sport") == 0.0


def test_long_prompts_averages_and_turns():
    assert {LongBench(edition=edition).overlong for edition in EDITIONS} == {"truncate"}
    setting = {"cell": "full", "method": "full", "budget": None, "compress_at": "context", "model": "m", "length": 0}
    [category, overall] = LongBench().averages([setting | {"task": "qasper", "mean": 0.25}])
    assert category["mean"] == overall["mean"] == 0.25
    fields = {"context": "c", "question": "q", "answers": ("a",), "max_new_tokens": 8, "length": 0}
    samples = [Sample(id=str(index), task="qasper", **fields) for index in range(2)]
    assert LongBench().turns(samples, 3) == samples
