"""The tasks of InfiniteBench (arXiv 2402.13718, table 2): their files, prompts, answers and scores.

Prompts and scores are those that lm-eval carries (``tasks/infinitebench``), in the official wording. Calculating
(``math_calc``) is not among them: its answers have 30,000 tokens, and no model of the paper scores above 0.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvgauge.benchmarks.longbench.prompts import task_file
from kvgauge.errors import UserError

_LM_EVAL = "infinitebench"
_MARK = "\u241e"  # stands for the context while the prompt is taken apart around it


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        file: the official file's name, without ``.jsonl``.
        carried: what lm-eval calls it.
        max_new_tokens: official number of tokens of the answer.
        kind: of `kvgauge.contract.benchmark.KINDS`, or a word of its own.
        options: whether it has four answers to choose from.
        in_stand_in: whether `kvgauge.benchmarks.infinitebench.stand_in` makes rows of its kind.
    """

    file: str
    carried: str
    max_new_tokens: int
    kind: str
    options: bool = False
    in_stand_in: bool = False


TASKS: dict[str, Task] = {
    task.file: task
    for task in (
        Task("passkey", "passkey", 6, "retrieval", in_stand_in=True),
        Task("number_string", "number_string", 12, "retrieval", in_stand_in=True),
        Task("kv_retrieval", "kv_retrieval", 50, "retrieval", in_stand_in=True),
        Task("longbook_sum_eng", "longbook_sum_en", 1200, "summarization"),
        Task("longbook_qa_eng", "longbook_qa_en", 40, "qa", in_stand_in=True),
        Task("longbook_qa_chn", "longbook_qa_chn", 40, "qa"),
        Task("longbook_choice_eng", "longbook_choice_en", 40, "qa", options=True, in_stand_in=True),
        Task("longdialogue_qa_eng", "longdialogue_qa_en", 40, "qa"),
        Task("code_debug", "code_debug", 5, "code", options=True),
        Task("code_run", "code_run", 5, "code", in_stand_in=True),
        Task("math_find", "math_find", 3, "aggregation", in_stand_in=True),
    )
}


def parts(task: Task, row: Mapping[str, Any]) -> tuple[str, str]:
    """The prompt of a row up to the end of its long text, and the rest.

    Raises:
        UserError: the installed lm-eval does not carry the task.
    """
    from lm_eval.utils import apply_template  # takes seconds

    content = _carried(task)
    document = dict(row) | {"context": _MARK}
    said = str(content["doc_to_text"])
    if said.startswith("utils."):
        text = str(getattr(_utils(), said.removeprefix("utils."))(document))
    else:
        text = str(apply_template(said, document))
    head, mark, tail = (str(content.get("description", "")) + text).partition(_MARK)
    if not mark:
        raise UserError(f"lm-eval's prompt of InfiniteBench {task.file} has no context: pip install lm-eval==0.4.13")
    return head + str(row["context"]), tail


def score(task: Task, row: Mapping[str, Any], answer: str) -> float:
    """The score of an answer, from 0 to 1, by lm-eval's function of the task.

    Args:
        task: which.
        row: has the official ``answer`` and ``options``.
        answer: the generated text.
    """
    content = _carried(task)
    name = str(content.get("process_results", "utils.process_results")).removeprefix("utils.")
    return float(getattr(_utils(), name)(dict(row), [answer])["score"])


def _carried(task: Task) -> dict[str, Any]:
    return task_file(f"{_LM_EVAL}_{task.carried}", _LM_EVAL, "InfiniteBench")


def _utils() -> Any:
    return importlib.import_module(f"lm_eval.tasks.{_LM_EVAL}.utils")
