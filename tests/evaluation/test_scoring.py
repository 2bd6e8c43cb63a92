from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from lm_eval.tasks.ruler.common_utils import process_results

from kvgauge.errors import UserError
from kvgauge.evaluation.scoring import averages, limit, scorer
from kvgauge.prompts.samples import Sample

SampleMaker = Callable[..., list[Sample]]


def test_ruler_scores_are_lm_evals(make_samples: SampleMaker) -> None:
    for index, sample in enumerate(make_samples(6)):
        wanted, more = sample.answers[0], str(index)
        sample = replace(sample, answers=(wanted, more))
        for answer in (wanted, f" {wanted} and {more}", "", "nothing", wanted[:-1], f"\n{more}\x00{wanted.upper()}"):
            # lm-eval scores a document under its own length and says -1 everywhere else
            document = {"max_length": 4096, "outputs": list(sample.answers)}
            assert scorer("ruler")(sample, answer) == process_results(document, [answer])["4096"]


def test_longbench_is_scored_by_its_own_metrics(make_samples: SampleMaker) -> None:
    [sample] = make_samples(1)
    classes = ("Food", "Sport")
    question = replace(sample, task="trec", answers=("Food",), facts={"all_classes": list(classes)})
    assert scorer("longbench")(question, "Food\nSport") == 1.0
    assert scorer("longbench")(question, "Sport") == 0.0


def test_limits_and_averages_are_the_benchmarks() -> None:
    assert (limit("ruler"), limit("longbench"), limit("longbench_e")) == ("refuse", "truncate", "truncate")
    assert averages("ruler", []) is None
    setting = {"cell": "full", "method": "full", "budget": None, "compress_at": "context", "model": "m", "length": 0}
    [category, overall] = averages("longbench", [setting | {"task": "qasper", "mean": 0.25}]) or []
    assert category["mean"] == overall["mean"] == 0.25


def test_an_unknown_benchmark_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'ruler'"):
        scorer("rulr")
