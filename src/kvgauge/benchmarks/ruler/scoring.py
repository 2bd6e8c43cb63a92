"""RULER's official scores, computed by lm-eval's functions."""

from __future__ import annotations

from collections.abc import Sequence

# Only this module of lm-eval's RULER: the others make or download data when they are imported or called.
from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

from kvgauge.benchmarks.ruler.tasks import TASKS
from kvgauge.errors import UserError, unknown


def score(task: str, answer: str, answers: Sequence[str]) -> float:
    """The score of one answer, from 0 to 1.

    Blanks around the answer are dropped and control characters become line breaks; case does not matter.
    ``string_match_all`` (every task but QA) is the share of the references that the answer contains;
    ``string_match_part`` (QA) is 1 if it contains any of them. lm-eval's own ``string_match_part`` gives the share for
    a single sample too, where RULER takes the best reference (scripts/eval/synthetic/constants.py): hence the maximum
    over one reference at a time here.

    Args:
        task: one of RULER's tasks.
        answer: the generated text, without the answer prefix.
        answers: the references.

    Raises:
        UserError: an unknown task, or no references.
    """
    if task not in TASKS:
        raise unknown("RULER task", task, TASKS)
    if not answers:
        raise UserError(f"task {task}: a sample without references cannot be scored: prepare the prompts again")
    if TASKS[task].metric == "string_match_part":
        return max(matched(answer, [reference]) for reference in answers)
    return matched(answer, answers)


def matched(answer: str, references: Sequence[str]) -> float:
    """RULER's ``string_match_all`` of one answer: the share of the references that it contains."""
    return float(string_match_all(postprocess_pred([answer]), [list(references)]))
