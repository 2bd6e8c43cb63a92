"""LongBench's official scores, computed by lm-eval's functions.

Two things of lm-eval 0.4.13 are set right. Its code score skips blank lines before it takes the first line of code,
where the official one takes the first line whatever it holds. Its ROUGE-L, as the official one, turns every error into
a score of 0, also the recursion error that long sentences cause in the ``rouge`` package, and so scores the same
answer differently from another depth of calls: here there is room for the recursion.

The code score is ``fuzzywuzzy``'s, which counts differently if ``python-Levenshtein`` is installed beside it; the
official requirements do not install it.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType

from kvgauge.benchmarks.longbench.datasets import Metric, dataset_of
from kvgauge.errors import UserError


def score(task: str, answer: str, answers: Sequence[str], all_classes: Sequence[str] | None = None) -> float:
    """The score of one answer, from 0 to 1: that of the reference it fits best.

    Args:
        task: a dataset of either edition, as in `Sample.task`.
        answer: the generated text. Of few-shot answers only the first line counts.
        answers: the references.
        all_classes: of a classification dataset.

    Raises:
        UserError: an unknown task, no references, a reference that is not one of the dataset's, or no classes where
            they are needed.
    """
    dataset = dataset_of(task)
    if not answers:
        raise UserError(f"task {task}: a sample without references cannot be scored: prepare the prompts again")
    if dataset.metric == "classification" and not all_classes:
        raise UserError(f"task {task}: a sample without all_classes cannot be scored: prepare the prompts again")
    if dataset.first_line_only:
        answer = first_line(answer)
    metric = _metrics()[dataset.metric]
    try:
        return max(metric(answer, reference, tuple(all_classes or ())) for reference in answers)
    except IndexError as error:  # the retrieval scores look for a paragraph's number
        raise UserError(f"task {task}: a reference of {list(answers)} names no paragraph: check the files") from error


def first_line(answer: str) -> str:
    """The first line after leading line breaks, as the official script cuts few-shot answers."""
    return answer.lstrip("\n").split("\n")[0]


def first_code_line(answer: str) -> str:
    """The first line after leading line breaks without a backtick, ``#`` or ``//``; empty if there is none."""
    lines = answer.lstrip("\n").split("\n")
    return next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")


_Function = Callable[[str, str, tuple[str, ...]], float]


@cache
def _metrics() -> dict[Metric, _Function]:
    library = _library()

    def plain(name: str) -> _Function:
        function = getattr(library, name)
        return lambda answer, reference, classes: float(function(answer, reference))

    def classification(answer: str, reference: str, classes: tuple[str, ...]) -> float:
        return float(library.classification_score(answer, reference, all_classes=classes))

    def code_sim(answer: str, reference: str, classes: tuple[str, ...]) -> float:
        return float(library.code_sim_score(first_code_line(answer), reference))

    def rouge(name: str) -> _Function:
        function = getattr(library, name)

        def measure(answer: str, reference: str, classes: tuple[str, ...]) -> float:
            with _recursion(len(answer) + len(reference)):
                return float(function(answer, reference))

        return measure

    return {
        "qa_f1": plain("qa_f1_score"),
        "qa_f1_zh": plain("qa_f1_zh_score"),
        "rouge_l": rouge("rouge_score"),
        "rouge_l_zh": rouge("rouge_zh_score"),
        "classification": classification,
        "retrieval": plain("retrieval_score"),
        "retrieval_zh": plain("retrieval_zh_score"),
        "count": plain("count_score"),
        "code_sim": code_sim,
    }


@contextmanager
def _recursion(depth: int) -> Iterator[None]:
    """Room for `depth` more nested calls: ``rouge`` walks back through a table by recursion, a call for each word."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + depth)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def _library() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using slow pure-python SequenceMatcher")
            from lm_eval.tasks.longbench import metrics
    except ImportError as error:
        raise UserError(
            "LongBench's scores need jieba, fuzzywuzzy and rouge: pip install 'kvgauge[longbench]'"
        ) from error
    import jieba

    jieba.setLogLevel(logging.WARNING)  # it tells on stderr how it builds its dictionary
    return metrics
