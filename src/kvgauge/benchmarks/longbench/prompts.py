"""The official prompts: where a dataset's context and question go.

lm-eval carries them in its task files. Six of those differ from the official ``config/dataset2prompt.json`` of the
THUDM/LongBench repository in blanks and line breaks, which matters to models that continue a text; they are put right
here. A digest of all 21 keeps another version of lm-eval from changing prompts, and with them results, unnoticed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from kvgauge.benchmarks.longbench.datasets import DATASETS
from kvgauge.errors import UserError

_CONTEXT, _INPUT = "{{context}}", "{{question}}"
# The official prompts have this before the part that follows the context ...
_ADDED_BEFORE = {"triviaqa": "\n", "samsum": "\n"}
# ... and this at their very end, where lm-eval's files have nothing.
_ADDED_AFTER = {"passage_count": " ", "passage_retrieval_en": " ", "lcc": "\n", "repobench-p": "\n"}
# SHA-256 of the official prompts, as `digest` takes it.
OFFICIAL_DIGEST = "2311f85e3557f3bd9a64634e34d1d33463ac1c35f342a7224407dcc890487d64"


@dataclass(frozen=True)
class PromptFormat:
    """The text around a dataset's context and input.

    Attributes:
        head: everything before the context.
        tail: everything after it, `{{question}}` standing for the input where the dataset has one.
    """

    head: str
    tail: str

    def context(self, context: str) -> str:
        """The part of the prompt that a cache may compress before the question is known."""
        return self.head + context

    def question(self, text: str) -> str:
        """The rest of the prompt; `text` is the row's ``input``."""
        return self.tail.replace(_INPUT, text)


@cache
def prompt_formats() -> dict[str, PromptFormat]:
    """The official format of every dataset.

    Raises:
        UserError: the installed lm-eval has other prompts than the official ones.
    """
    formats = {name: _read(name) for name in DATASETS}
    if digest(formats) != OFFICIAL_DIGEST:
        raise UserError(
            f"lm-eval {version('lm-eval')} carries other LongBench prompts than the official ones: "
            "pip install lm-eval==0.4.13"
        )
    return formats


def digest(formats: dict[str, PromptFormat]) -> str:
    """SHA-256 of all prompts as JSON: names sorted, each ``[head, tail]``."""
    text = json.dumps({name: [form.head, form.tail] for name, form in formats.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class _Loader(yaml.SafeLoader):
    """Reads lm-eval's task files without importing the functions they name."""


def _name_only(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    return node.value


_Loader.add_constructor("!function", _name_only)


def task_file(name: str, folder: str = "longbench", title: str = "LongBench") -> dict[str, Any]:
    """lm-eval's own description of a dataset; functions are left as the names they have there.

    Args:
        name: of the file.
        folder: of lm-eval's tasks, where the file stands.
        title: of the benchmark, for error messages.

    Raises:
        UserError: the installed lm-eval does not have it.
    """
    # find_spec does not run the package's code: importing all of lm-eval takes seconds
    spec = importlib.util.find_spec("lm_eval")
    path = Path(spec.origin).parent / "tasks" / folder / f"{name}.yaml" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(f"lm-eval does not carry {title}'s {name}: pip install 'lm-eval[longbench]==0.4.13'")
    content: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    return content


def _read(name: str) -> PromptFormat:
    head, _, tail = str(task_file(name)["doc_to_text"]).partition(_CONTEXT)
    return PromptFormat(head, _ADDED_BEFORE.get(name, "") + tail + _ADDED_AFTER.get(name, ""))
