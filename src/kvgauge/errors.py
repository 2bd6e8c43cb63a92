"""Errors that a user can cause, and how they are told: one line that says what is wrong and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input, not in the program.

    The message is one line: what is wrong, then what to do. Every stage prints it without a traceback and exits
    with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def unknown(kind: str, name: str, choices: Iterable[str]) -> UserError:
    """A `UserError` for a name that does not exist, with the nearest name that does.

    Args:
        kind: what the name stands for, e.g. ``"method"``.
        name: what the user wrote.
        choices: the names that exist.
    """
    known = sorted(choices)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {kind} {name!r}: {hint}choose one of {', '.join(known)}")
