import pytest

from kvgauge import configuration
from kvgauge.benchmarks.ruler import TASKS, Ruler
from kvgauge.errors import UserError


def test_the_yaml_file_builds_it():
    config = configuration.build(configuration.read("benchmark", "ruler"), "benchmark", samples=2)
    assert config == Ruler(samples=2)
    assert config.tasks == tuple(TASKS)
    assert config.lengths == (1024,)


def test_one_task_may_be_written_without_a_list():
    assert Ruler(tasks="vt").tasks == ("vt",)
    assert Ruler(tasks=["vt", "qa_1"]).tasks == ("vt", "qa_1")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": ["qa_3"]}, "unknown RULER task 'qa_3': did you mean"),
        ({"tasks": []}, "at least one task"),
        ({"lengths": []}, "at least one task and one length"),
        ({"lengths": [0]}, "above 0"),
        ({"samples": 0}, "samples is 0"),
    ],
)
def test_bad_values_are_one_line(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        Ruler(**fields)
    assert "\n" not in str(caught.value)
