from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvgauge
from kvgauge import lm_eval as command
from kvgauge.errors import UserError
from kvgauge.evaluation.lm_eval_model import KVGaugeLM

Tiny = tuple[PreTrainedModel, PreTrainedTokenizerBase]
TASKS = {
    "generation": {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": ["red", "blue"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    folder = tmp_path_factory.mktemp("tasks")
    with (folder / "documents.jsonl").open("w") as stream:
        for index in range(3):
            text = "The colour of the sky is " + "very " * (8 + 3 * index) + "often"
            stream.write(json.dumps({"text": text, "answer": "blue"}) + "\n")
    for name, task in TASKS.items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}},
            "test_split": "test",
            "doc_to_text": "{{text}}",
        }
        (folder / f"{name}.yaml").write_text(json.dumps(common | task))  # JSON is YAML
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def projections(moments: kvgauge.Moments, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> str:
    fitted = kvgauge.build_method("ksvd").fit(moments, tiny[0])
    assert fitted is not None
    path = tmp_path_factory.mktemp("fit") / "projections.safetensors"
    fitted.save(path)
    return str(path)


def responses(lm: Any, manager: TaskManager) -> dict[str, list[Any]]:
    result = lm_eval.simple_evaluate(
        model=lm, tasks=list(TASKS), task_manager=manager, log_samples=True, bootstrap_iters=0
    )
    return {name: [response for sample in result["samples"][name] for response in sample["resps"]] for name in TASKS}


def assert_same(first: dict[str, list[Any]], second: dict[str, list[Any]]) -> None:
    assert first["generation"] == second["generation"]
    scores = [[score for [(score, _)] in answers["choice"]] for answers in (first, second)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


@pytest.fixture(scope="module")
def plain(tiny: Tiny, manager: TaskManager) -> dict[str, list[Any]]:
    return responses(HFLM(pretrained=tiny[0], tokenizer=tiny[1], batch_size=1), manager)


def test_it_is_registered() -> None:
    assert get_model("kvgauge") is KVGaugeLM


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_uncompressed_cache_answers_as_lm_evals_own_model(
    manager: TaskManager, plain: dict[str, list[Any]], batch_size: int
) -> None:
    lm = KVGaugeLM("tiny/llama", method="full", batch_size=batch_size)
    assert_same(responses(lm, manager), plain)
    assert lm.compressed_prompts == 3 + 6  # one for each prompt, one for each choice


def test_at_full_rank_nothing_changes(manager: TaskManager, plain: dict[str, list[Any]], projections: str) -> None:
    lm = KVGaugeLM("tiny/llama", method="ksvd", fitted=projections, method_rank=16)
    assert_same(responses(lm, manager), plain)


def test_at_low_rank_the_compressed_cache_is_what_answers(
    manager: TaskManager, plain: dict[str, list[Any]], projections: str
) -> None:
    lm = KVGaugeLM("tiny/llama", method="ksvd", budget=0.25, fitted=projections)
    found = responses(lm, manager)
    assert lm.compressed_prompts == 9
    assert found["generation"] != plain["generation"]
    assert found["choice"] != plain["choice"]


def test_bad_arguments_end_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tail is 0"):
        KVGaugeLM("tiny/llama", method="full", tail=0)
    with pytest.raises(UserError, match=r"kvgauge fit method=ksvd"):
        KVGaugeLM("tiny/llama", method="ksvd", artifacts=str(tmp_path))
    with pytest.raises(UserError, match="did you mean 'budget'"):
        KVGaugeLM("tiny/llama", method="ksvd", method_bugdet=0.5)


def test_scoring_whole_texts_is_refused() -> None:
    lm = KVGaugeLM("tiny/llama", method="full")
    with pytest.raises(UserError, match="no context to compress"):
        lm.loglikelihood_rolling([])


def test_a_task_that_it_does_not_know_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "kvgauge", "--model_args", "pretrained=tiny/llama", "--tasks", "nosuch"]
    monkeypatch.setattr("sys.argv", ["kvgauge lm-eval", *arguments])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("kvgauge: tasks not found: nosuch: ")
