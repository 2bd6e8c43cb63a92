"""The wheel alone: built, installed beside the environment's packages, and run in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kvgauge.artifacts import read_json, read_lines
from kvgauge.cli.commands import COMMANDS, is_stage
from kvgauge.configuration import CONF_DIR

ROOT = CONF_DIR.parent
SETTING = [
    "model=tiny/llama",
    "benchmark.tasks=[niah_single_1]",
    "benchmark.lengths=[1024]",
    "benchmark.samples=2",
    "corpus.sequence_length=256",
    "corpus.num_sequences=2",
]
OWN = """
from dataclasses import dataclass
from kvgauge.methods.merging.streaming_llm import StreamingLLM


@dataclass(frozen=True, kw_only=True)
class Mine(StreamingLLM):
    name: str = "mine"
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    [path] = folder.glob("kvgauge-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--target", folder, wheel)
    return folder


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, "--quiet", "--no-deps"]
    subprocess.run(command, check=True, timeout=300)


def kvgauge(installed, folder, *arguments):
    """The installed command in a folder, nothing of the clone in its path."""
    return subprocess.run(
        [installed / "bin" / "kvgauge", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_it_holds_every_stage_and_the_configuration(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"kvgauge"}
    assert {f"kvgauge/pipelines/{name}.py" for name in COMMANDS if is_stage(name)} <= names
    assert {f"kvgauge/conf/{path.relative_to(CONF_DIR)}" for path in CONF_DIR.rglob("*.yaml")} <= names


def test_its_stages_import_nothing_of_the_clone(wheel):
    archive = zipfile.ZipFile(wheel)
    stages = [name for name in archive.namelist() if name.startswith("kvgauge/pipelines/")]
    assert len(stages) > len([name for name in COMMANDS if is_stage(name)])
    for name in stages:
        lines = [line.strip() for line in archive.read(name).decode().splitlines()]
        assert not [line for line in lines if line.startswith(("from pipelines", "import pipelines"))], name


def test_prompts_and_answers_from_an_empty_folder(installed, tmp_path):
    where = "import kvgauge.artifacts as found; print(found.__file__)"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    path = subprocess.run([sys.executable, "-c", where], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert Path(path.stdout.strip()).is_relative_to(installed)

    done = kvgauge(installed, tmp_path, "evaluate", *SETTING, "method=full")
    assert done.returncode == 2
    assert "run `kvgauge prepare` first" in done.stderr.splitlines()[-1]

    done = kvgauge(installed, tmp_path, "prepare", *SETTING)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3

    (tmp_path / "my_method.py").write_text(OWN)
    panel = "panel=[{method: full},{method: my_method.Mine, budget: 0.5}]"
    done = kvgauge(installed, tmp_path, "evaluate", *SETTING, panel)
    assert done.returncode == 0, done.stderr
    [directory] = (tmp_path / "artifacts" / "evaluate").iterdir()
    assert done.stdout.splitlines()[-1] == str(directory.relative_to(tmp_path))
    assert [row["cell"] for row in read_lines(directory / "samples.jsonl")] == ["full"] * 2 + ["mine@0.5"] * 2
    assert read_json(directory / "meta.json")["environment"]["git"] == "unknown"
    assert {path.name for path in tmp_path.iterdir()} <= {"artifacts", "my_method.py", "__pycache__"}
