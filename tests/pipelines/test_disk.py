"""A disk that fills up and one that is read-only, as a user meets them: mounted in a namespace of the test's own."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir

from kvgauge.configuration import CONF_DIR
from kvgauge.models.loading import load_tokenizer
from pipelines.prepare import prepare_prompts

SETTING = ["model=tiny/llama", "benchmark.tasks=[niah_single_1]", "benchmark.lengths=[1024]", "benchmark.samples=5"]
NAMESPACE = ["unshare", "--map-root-user", "--mount"]


def can_mount():
    """Whether this machine lets a test mount something."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not can_mount(), reason="may not mount a file system here")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("config", overrides=[*SETTING, f"artifacts={root}"])
    prepare_prompts(cfg, load_tokenizer("tiny/llama"))
    return root


def inside(folder, prompts, script):
    """The lines that a script prints in a namespace of its own, where ``disk`` is a file system of two megabytes.

    ``evaluate`` in it prints the exit code, and how many lines there were on stderr beside progress bars: those.
    """
    command = shlex.join([sys.executable, "-m", "kvgauge", "evaluate", *SETTING, "method=full", "artifacts=disk"])
    start = f"""
        evaluate() {{ code=0; {command} 2>error >/dev/null || code=$?; echo "$code"; grep ^kvgauge: error || true; }}
        mkdir disk; mount -t tmpfs -o size=2m tmpfs disk; cp -r {shlex.quote(str(prompts))}/. disk
    """
    environment = os.environ | {"PYTHONPATH": str(CONF_DIR.parent / "src")}
    run = [*NAMESPACE, "bash", "-ec", start + script]
    done = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_full_disk_is_one_line_and_nothing_is_lost(prompts, tmp_path):
    # Four pages are left: one for what is said of the cell, three for answers, of which there are five.
    script = """
        dd if=/dev/zero of=disk/filler bs=4k status=none 2>/dev/null || true
        truncate -s -16k disk/filler
        evaluate
        find disk/answers -name '*-*.json' ! -name '.*' -exec md5sum {} + | tee sums | wc -l
        find disk -name '.*' -type f | wc -l
        rm disk/filler
        evaluate
        md5sum --quiet -c sums && find disk/answers -name '*-*.json' | wc -l
        ls disk/evaluate/*/meta.json | wc -l
    """
    code, line, stored, torn, again, answers, finished = inside(tmp_path, prompts, script)
    assert code == "2"
    assert line.startswith("kvgauge: cannot write disk/answers/")
    assert "No space left on device: make room or give another place with artifacts=" in line
    assert (int(stored), torn) == (3, "0")
    assert (again, answers, finished) == ("0", "5", "1")


def test_a_read_only_directory_is_one_line(prompts, tmp_path):
    code, line, found = inside(
        tmp_path, prompts, "mount -o remount,ro disk; evaluate; find disk -name meta.json | wc -l"
    )
    assert (code, found) == ("2", "1")
    assert line.startswith("kvgauge: cannot write disk/evaluate/")
    assert "Read-only file system: give another place with artifacts=" in line
