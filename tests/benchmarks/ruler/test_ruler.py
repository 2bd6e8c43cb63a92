from dataclasses import replace

import pytest
from lm_eval.tasks.ruler.common_utils import process_results

from kvgauge import configuration
from kvgauge.benchmarks.ruler import TASKS, Ruler, generate
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


def test_scores_are_lm_evals(prompt_length, sources):
    for index, sample in enumerate(generate("niah_multikey_1", 600, 6, 3, prompt_length, sources)):
        wanted, more = sample.answers[0], str(index)
        sample = replace(sample, answers=(wanted, more))
        for answer in (wanted, f" {wanted} and {more}", "", "nothing", wanted[:-1], f"\n{more}\x00{wanted.upper()}"):
            # lm-eval scores a document under its own length and says -1 everywhere else
            document = {"max_length": 4096, "outputs": list(sample.answers)}
            assert Ruler().score(sample, answer) == process_results(document, [answer])["4096"]


def test_long_prompts_are_refused_and_no_averages_printed():
    assert Ruler().overlong == "refuse"
    assert Ruler().averages([]) is None
