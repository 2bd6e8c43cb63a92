"""Chat templates that render the same text every day, with the values that the user gives them."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from datetime import date
from typing import Any

from transformers import PreTrainedTokenizerBase

from kvgauge.errors import UserError

NOW = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<form>.*?)(?P=quote)\s*\)""")
OWN = ("messages", "conversation", "tools", "documents", "add_generation_prompt", "tokenize")  # of every prompt


def fix_template(tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any], today: str) -> None:
    """Let every use of the tokenizer's chat template see `values`, and `today` wherever it asks for the date.

    Some templates print today's date: prompts, and with them stored answers, would be others every day.

    Args:
        tokenizer: changed in place.
        values: of the template's variables, e.g. ``{"enable_thinking": False}``.
        today: a date, ``YYYY-MM-DD``.

    Raises:
        UserError: no such date, a value for what every prompt brings with it, or a template that asks for the date in
            a form that it computes.
    """
    try:
        day = date.fromisoformat(today)
    except (TypeError, ValueError) as error:
        raise UserError(f"model.date {today!r} is no date: write it as 2026-01-31") from error
    for name in values:
        if name in OWN:
            raise UserError(f"model.chat_template_kwargs sets {name}, which is the prompt's own: leave it out")
    if isinstance(tokenizer.chat_template, str):
        fixed = NOW.sub(lambda call: repr(day.strftime(call["form"])), tokenizer.chat_template)
        if re.search(r"strftime_now\s*\(", fixed):
            raise UserError(
                "the chat template computes how it prints today's date, which would change every prompt every day: "
                "give a tokenizer whose template does not"
            )
        tokenizer.chat_template = fixed
    vars(tokenizer)["template_values"] = dict(values)
    vars(tokenizer)["apply_chat_template"] = functools.partial(type(tokenizer).apply_chat_template, tokenizer, **values)


def template_values(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The values that `fix_template` gave the tokenizer's template."""
    known: dict[str, Any] = getattr(tokenizer, "template_values", {})
    return known
