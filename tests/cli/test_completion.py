"""Completion as a shell asks for it: the script that Hydra prints, sourced and called by bash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvgauge.cli import completion
from kvgauge.cli.commands import COMMANDS

SOURCE = Path(__file__).parents[2] / "src"
# A line of bash as readline would have it: words, which of them, and the function that is asked.
ASK = """
ask() {
    COMP_LINE="$1"; COMP_POINT=${#1}; local words=($1); COMP_CWORD=$(( ${#words[@]} - 1 ))
    [[ "$1" == *" " ]] && COMP_CWORD=${#words[@]}
    COMPREPLY=(); hydra_bash_completion; echo "${COMPREPLY[*]}"
}
"""


@pytest.fixture
def program(tmp_path):
    """A folder with the command in it."""
    code = f"import sys; sys.argv[0] = '{tmp_path}/kvgauge'; from kvgauge.cli.main import main; main()"
    path = tmp_path / "kvgauge"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={SOURCE} exec {sys.executable} -c "{code}" "$@"\n')
    path.chmod(0o755)
    return tmp_path


def bash(program, script):
    environment = os.environ | {"PATH": f"{program}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=program, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("install", ["kvgauge evaluate -sc install=bash", "kvgauge -sc install=bash"])
def test_bash_completes_commands_and_overrides(program, install):
    lines = ["kvgauge ev", "kvgauge evaluate method=kqs", "kvgauge fit -m method=kqsvd method.budg"]
    asked = "; ".join(f'ask "{line}"' for line in lines)
    rule, *found = bash(program, f'eval "$({install})"; {ASK} complete -p kvgauge; {asked}')
    assert rule.endswith("-F hydra_bash_completion kvgauge")
    assert found == ["evaluate", "method=kqsvd", "method.budget="]


@pytest.mark.parametrize(
    ("line", "words"), [("kvgauge ", list(COMMANDS)), ("kvgauge m", ["merge", "methods", "models"])]
)
def test_the_first_word_is_a_command(monkeypatch, capsys, line, words):
    monkeypatch.setenv("COMP_LINE", line)
    completion.complete(["query=bash"])
    assert capsys.readouterr().out.split() == words
    completion.complete(["query=fish"])
    assert capsys.readouterr().out.splitlines() == words


def test_behind_a_program_or_a_typo_nothing_is_known(monkeypatch, capsys):
    for line in ("kvgauge models ", "kvgauge evaluat method="):
        monkeypatch.setenv("COMP_LINE", line)
        completion.complete(["query=bash"])
    assert capsys.readouterr().out == ""
