"""lm-eval's tasks by name, with its own errors in one line each."""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvgauge.errors import UserError

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

GENERATION = "generate_until"
LIKELIHOOD = ("multiple_choice", "loglikelihood")
PYTHON_SEED, NUMPY_SEED = 0, 1234  # lm-eval's own: a few tasks draw their documents with the global generators


def load_tasks(names: Sequence[str], include_path: str | None, num_fewshot: int | None, seed: int) -> dict[str, Task]:
    """The tasks of names; groups and tags give all of theirs.

    Args:
        names: as lm-eval's ``--tasks`` takes them: names, patterns with ``*``, or paths of YAML files.
        include_path: a directory with task files of the user's own; they come before lm-eval's.
        num_fewshot: examples in a prompt; None leaves the tasks theirs. As in lm-eval, a task that says 0 keeps it.
        seed: of the draw of examples.

    Raises:
        UserError: an unknown name, a task that cannot be loaded, or one that has neither generation nor likelihood.
    """
    with global_seeds():
        manager = _manager(names, include_path)
        tasks: dict[str, Task] = {}
        for name in names:
            found = manager.match_tasks([name]) or [name] * Path(name).is_file()
            if not found:
                raise _unknown(name, manager.all_tasks, include_path)
            for known in found:
                if (entry := manager.task_index.get(known)) is not None:  # before its documents are downloaded
                    _check_output(known, (entry.cfg or {}).get("output_type"))
            try:
                tasks |= manager.load(found)["tasks"]
            except Exception as error:  # whatever a task file, its functions and its dataset do
                reason = next(iter(str(error).strip().splitlines()), "")[:200]
                raise UserError(
                    f"lm-eval cannot load task {name} ({type(error).__name__}: {reason}): get its files, and set "
                    f"benchmark.include_path where they are your own, or take another task"
                ) from error
    for name, task in tasks.items():
        _check(name, task)
        _few_shots(task, num_fewshot)
        task.set_fewshot_seed(seed=seed)
    return tasks


@contextmanager
def global_seeds() -> Iterator[None]:
    """Python's and NumPy's generators as lm-eval's own loop seeds them, and afterwards as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(PYTHON_SEED)
    np.random.seed(NUMPY_SEED)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def is_generation(task: Task) -> bool:
    """Whether a task has texts generated, not scored."""
    return str(task.OUTPUT_TYPE) == GENERATION


def _manager(names: Sequence[str], include_path: str | None) -> TaskManager:
    from lm_eval.tasks import TaskManager  # takes seconds

    if include_path is not None:
        # lm-eval's own index is thousands of files; the user's are few, and come first anyway
        own = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=include_path)


def _unknown(name: str, known: Sequence[str], include_path: str | None) -> UserError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    where = f", neither lm-eval's nor one below {include_path}" if include_path else ""
    return UserError(
        f"unknown lm-eval task {name!r}{where}: {hint}`lm-eval ls tasks` lists lm-eval's, benchmark.include_path adds "
        f"your own"
    )


def _check_output(name: str, output: str | None) -> None:
    if output is not None and output not in (GENERATION, *LIKELIHOOD):
        raise UserError(
            f"lm-eval task {name} has neither generation nor likelihood of a continuation ({output}): "
            f"without a context before what is scored there is nothing to compress, take another task"
        )


def _check(name: str, task: Task) -> None:
    _check_output(name, str(task.OUTPUT_TYPE))
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"lm-eval task {name} needs images or sound, and prompts here are text: take another task")
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"lm-eval task {name} runs the code that a model writes, which nothing here shields you from: run it "
            f"with `kvgauge lm-eval --confirm_run_unsafe_code`"
        )
    if (repeats := task.get_config("repeats") or 1) > 1:
        raise UserError(
            f"lm-eval task {name} takes {repeats} answers to a question together: take a task with one, and repeats= "
            f"with temperature= for the mean of several"
        )


def _few_shots(task: Task, num_fewshot: int | None) -> None:
    """The number of examples, by the rules of lm-eval's own loop."""
    said: Any = task.get_config("num_fewshot")
    if num_fewshot is None or said == 0:
        task.set_config(key="num_fewshot", value=said or 0)
    else:
        task.set_config(key="num_fewshot", value=num_fewshot)
