"""What a killed evaluation loses: kill -9 at random moments, run again, count.

    python -m pipelines.studies.crash_recovery --artifacts artifacts --kills 5 -- panel=pareto benchmark.samples=4

What stands behind ``--`` goes to ``kvgauge evaluate``. Answers that are stored already would make it a
short run: give a seed or cells that are new, or an artifacts directory of its own. The run is killed, started again and
killed again; then it goes to its end, and once more from nothing. The last line is one JSON object: answers at every
kill, answers lost and answers computed twice, and whether the two results are the same to the byte.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from kvgauge.artifacts import read_lines
from kvgauge.errors import UserError
from kvgauge.stage import fail

RESULTS = ("samples.jsonl", "cells.json")
OUT = "crash-recovery"


def answers(store: Path) -> dict[Path, bytes]:
    """Every stored answer; the names that a killed writer left behind start with a dot and are not among them."""
    return {path: path.read_bytes() for path in store.rglob("[!.]*.json")}


def killed_run(command: list[str], store: Path, wait_for: int, pause: float) -> dict[Path, bytes]:
    """Start `command`, kill it `pause` seconds after it has stored `wait_for` answers more; what is then stored.

    Raises:
        UserError: it ended before.
    """
    start = len(answers(store))
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while len(list(store.rglob("[!.]*.json"))) < start + wait_for:
            if process.poll() is not None:
                raise UserError(
                    f"the run ended with code {process.returncode} before it could be killed: use more samples"
                )
            time.sleep(0.005)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
    return answers(store)


def recover(artifacts: Path, overrides: list[str], kills: int, seed: int) -> dict[str, Any]:
    """Kill a run `kills` times, let it finish, and compare with a run that nobody killed."""
    rng, store = random.Random(seed), artifacts / "answers"
    command = [sys.executable, "-m", "kvgauge", "evaluate", f"artifacts={artifacts}", *overrides]
    known, stored, lost, twice = answers(store), [], 0, 0
    before = len(known)
    for _ in range(kills):
        now = killed_run([*command, f"out={OUT}-killed"], store, rng.randint(1, 4), rng.random())
        lost += len(known.keys() - now.keys())
        twice += sum(now[path] != content for path, content in known.items() if path in now)
        stored.append(len(now) - before)
        known = now
    subprocess.run([*command, f"out={OUT}-killed"], check=True, stdout=subprocess.DEVNULL)
    finished = answers(store)
    lost += len(known.keys() - finished.keys())
    twice += sum(finished[path] != content for path, content in known.items() if path in finished)
    subprocess.run([*command, f"out={OUT}-whole", "store=false"], check=True, stdout=subprocess.DEVNULL)
    killed, whole = (artifacts / "evaluate" / f"{OUT}-{name}" for name in ("killed", "whole"))
    result = {
        "kills": kills,
        "answers": len(finished) - before,
        "answers_at_kills": stored,
        "answers_lost": lost,
        "answers_computed_twice": twice,
        "rows": len(read_lines(killed / "samples.jsonl")),
        "identical": all((killed / name).read_bytes() == (whole / name).read_bytes() for name in RESULTS),
    }
    for directory in (killed, whole):
        shutil.rmtree(directory)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"))
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    try:
        result = recover(options.artifacts, options.overrides, options.kills, options.seed)
    except UserError as error:
        fail(str(error))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
