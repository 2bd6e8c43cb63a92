"""The command: help at once, dispatch, one line for a mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from kvgauge.cli import commands, main
from kvgauge.cli.commands import COMMANDS, description, is_stage, summary
from kvgauge.configuration import CONF_DIR

SOURCE = Path(__file__).parents[2] / "src"


def command(monkeypatch, *arguments):
    """What the command's exit code is; 0 where it just returns."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/kvgauge", *arguments])
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        main.main()
    except SystemExit as end:
        return end.code
    return 0


def alone(*arguments, cwd, then=""):
    """The command in a process of its own, with the sources in its path and the clone not."""
    start = f"import sys; from kvgauge.cli.main import main; sys.argv = ['kvgauge', *{arguments!r}]"
    code = f"{start}\ntry: main()\nfinally: {then or 'pass'}"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_source_and_a_line(name):
    assert description(name).startswith(f"{name}: "), "the first line of the module's docstring names the command"
    assert 10 < len(summary(name)) <= 100 and "\n" not in summary(name)


def test_every_stage_of_the_clone_is_a_command():
    stages = {path.stem for path in (CONF_DIR.parent / "pipelines").glob("*.py")} - {"__init__"}
    assert stages == {name for name in COMMANDS if is_stage(name)}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(monkeypatch, capsys, arguments):
    assert command(monkeypatch, *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in COMMANDS:
        assert [line for line in lines if line.split()[:1] == [name] and line.endswith(summary(name))]


def test_help_and_version_and_completion_import_no_torch(tmp_path):
    then = "print('torch' in sys.modules, 'transformers' in sys.modules, file=sys.stderr)"
    for line in ("--help", "--version", "evaluate --help", "-sc query=bash", "evaluate -c job"):
        done = alone(*line.split(), cwd=tmp_path, then=then)
        assert done.stderr.split() == ["False", "False"], (line, done.stderr)
        assert done.stdout.strip()


def test_the_version_is_the_installed_one(monkeypatch, capsys):
    assert command(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"kvgauge {version('kvgauge')}\n"


def test_help_of_a_stage_is_its_docstring_and_hydra_s(monkeypatch, capsys):
    assert command(monkeypatch, "fit", "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: kvgauge fit [flags] [overrides]\n\nfit: what a method learns from the moments.")
    assert "kqsvd" in text and "batch_size: 1" in text and "--multirun,-m" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluat"], "unknown command 'evaluat': did you mean 'evaluate'? choose one of"),
        (["--versoin"], "unknown command '--versoin'"),
        (["fit", "method=kqsvdd"], "unknown method 'kqsvdd': did you mean 'kqsvd'"),
        (["fit", "--mutlirun"], "unrecognized arguments: --mutlirun"),
        (["fit", "model=5"], "bad configuration: Config group override must be a string"),
        (["models", "--jsn"], "unrecognized arguments: --jsn: see `kvgauge models --help`"),
        (["check", "smollm2-135"], "unknown model 'smollm2-135': did you mean 'smollm2-135m'"),
        (["check", "tiny/llama", "model.devise=cpu"], "devise"),
        (["estimate", "128000"], "unrecognized arguments: 128000"),
        (["-sc", "install=tcsh"], "completion is for bash, fish and zsh"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(monkeypatch, capfd, arguments, words):
    assert command(monkeypatch, *arguments) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("kvgauge: ") and words in line


def test_a_stage_runs_on_the_overrides(monkeypatch, capsys, tmp_path):
    settings = ["model=tiny/llama", "method=streaming_llm", f"artifacts={tmp_path}"]
    assert command(monkeypatch, "fit", *settings) == 0
    assert "streaming_llm: nothing to learn" in capsys.readouterr().err


def test_a_job_is_called_by_its_stage(monkeypatch, capsys):
    assert command(monkeypatch, "evaluate", "-c", "hydra", "-p", "hydra.job.name") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "evaluate"


def test_outside_the_clone_the_stages_of_the_sources_run_and_modules_there_are_found(tmp_path):
    (tmp_path / "my_method.py").write_text("raise RuntimeError('found it')\n")
    done = alone("fit", "method._target_=my_method.Mine", "artifacts=a", cwd=tmp_path)
    assert done.returncode == 2
    assert "importing my_method failed (RuntimeError: found it)" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    code = "from kvgauge.cli.main import main; import sys; sys.argv = ['kvgauge', '--help']; main()"
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(SOURCE)},
            stdout=pipe,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_stage_in_an_installed_package_is_the_package_s(monkeypatch, tmp_path):
    (tmp_path / "evaluate.py").write_text('"""evaluate: of a package."""\n')
    monkeypatch.setattr(commands, "PACKAGED", tmp_path)
    assert summary("evaluate") == "of a package"
