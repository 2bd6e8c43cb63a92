"""Completion of subcommands, and of their overrides by Hydra.

Hydra's script for a shell asks ``kvgauge -sc query=<shell>`` for the words that may follow ``$COMP_LINE``. The first
word is a subcommand; behind a stage's name Hydra answers, for a line without that name.
"""

from __future__ import annotations

import os

from kvgauge.cli.commands import COMMANDS, is_stage, run
from kvgauge.stage import fail


def complete(arguments: list[str]) -> None:
    """Answer ``install=<shell>``, ``uninstall=<shell>`` or ``query=<shell>``."""
    action, _, shell = "".join(arguments[:1]).partition("=")
    if action not in ("install", "uninstall", "query") or shell not in ("bash", "fish", "zsh"):
        fail("completion is for bash, fish and zsh: kvgauge -sc install=bash, uninstall=bash")
    if action != "query":
        _ask_hydra(arguments)
        return
    program, *words = os.environ.get("COMP_LINE", "kvgauge ").split(" ")
    name = words[0] if words else ""
    if len(words) < 2:
        separator = "\n" if shell == "fish" else " "
        print(separator.join(command for command in COMMANDS if command.startswith(name)))
    elif name in COMMANDS and is_stage(name):
        os.environ["COMP_LINE"] = " ".join([program, *words[1:]])
        _ask_hydra(arguments, name)


def _ask_hydra(arguments: list[str], name: str | None = None) -> None:
    run(name or next(filter(is_stage, COMMANDS)), ["-sc", *arguments])
