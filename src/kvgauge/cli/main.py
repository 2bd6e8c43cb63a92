"""The `kvgauge` command: its help, its version, its completion, and the way to a subcommand."""

from __future__ import annotations

import os
import signal
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kvgauge.cli import completion
from kvgauge.cli.commands import COMMANDS, run, summary
from kvgauge.errors import unknown
from kvgauge.stage import fail


def main() -> None:
    """Run what the command line asks for."""
    try:
        _run()
        sys.stdout.flush()
    except BrokenPipeError:  # its reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _run() -> None:
    _find_modules_here()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(usage())
    elif name == "--version":
        print(f"kvgauge {_version()}")
    elif name in ("--shell-completion", "-sc"):
        completion.complete(arguments)
    elif name in COMMANDS:
        run(name, arguments)
    else:
        fail(str(unknown("command", name, COMMANDS)))


def usage() -> str:
    """All subcommands with a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary(name)}" for name in COMMANDS]
    return "\n".join(
        [
            "usage: kvgauge <command> [flags] [overrides]",
            "",
            "KV-cache compression measured side by side, as real caches on the same prompts at the same bytes.",
            "",
            *lines,
            "",
            "kvgauge <command> --help says what a command does and what can be set, e.g.",
            "  kvgauge evaluate method=kqsvd method.budget=0.25",
            "Stages read and write ./artifacts. kvgauge --version tells the version.",
            'Completion: eval "$(kvgauge -sc install=bash)"',
        ]
    )


def _find_modules_here() -> None:
    """Let a class of a module in the current directory be named, as ``python -m`` does."""
    here = str(Path.cwd())
    if not getattr(sys.flags, "safe_path", False) and not {"", here} & set(sys.path):
        sys.path.insert(0, here)


def _version() -> str:
    try:
        return version("kvgauge")
    except PackageNotFoundError:
        return "(not installed: run from its sources)"
