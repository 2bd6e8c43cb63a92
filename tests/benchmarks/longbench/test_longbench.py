import pytest

from kvgauge import configuration
from kvgauge.benchmarks.longbench import DATASETS, LongBench
from kvgauge.errors import UserError


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
