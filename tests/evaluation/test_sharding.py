from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvgauge.errors import UserError
from kvgauge.evaluation.cell import Cell
from kvgauge.evaluation.sharding import Processes
from kvgauge.evaluation.store import AnswerStore
from kvgauge.evaluation.units import Unit
from kvgauge.prompts.samples import Sample

CellMaker = Callable[..., Cell]
SampleMaker = Callable[..., list[Sample]]


@pytest.fixture
def units(make_samples: SampleMaker) -> list[Unit]:
    return [Unit((sample,), False, (sample.id,)) for sample in make_samples(7)]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Processes(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Processes(3, 4, 1)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}, Processes(1, 2, 0)),
        # A batch script is one process, however many tasks its job may start.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}, Processes(0, 1, 0)),
    ],
)
def test_what_launchers_say(environment: dict[str, str], expected: Processes) -> None:
    assert Processes.of(environment) == expected


def test_what_is_no_number_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^RANK=0, WORLD_SIZE=two, LOCAL_RANK=0 in the environment are no numbers"):
        Processes.of({"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"})


@pytest.mark.parametrize("size", [1, 2, 3, 7, 9])
def test_shares_are_uneven_and_without_doubles(units: list[Unit], size: int) -> None:
    shares = [Processes(rank, size).share(units) for rank in range(size)]
    together = [unit for share in shares for unit in share]
    assert sorted(unit.keys for unit in together) == sorted(unit.keys for unit in units)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_silent_process_is_given_up_in_one_line(units: list[Unit], make_cell: CellMaker, tmp_path: Path) -> None:
    cell, store = make_cell("full"), AnswerStore(tmp_path)
    for unit in units[::2]:
        store.put(cell.fingerprint, unit.keys[0], {})
    with pytest.raises(UserError, match=r"process 1 of 2 gave no answer for 0\.05 s, 3 are missing"):
        Processes(0, 2).wait(units, [cell], store, patience=0.05, poll=0.01)


def test_waiting_ends_with_the_last_answer(units: list[Unit], make_cell: CellMaker, tmp_path: Path) -> None:
    cell, store = make_cell("full"), AnswerStore(tmp_path)
    started = threading.Event()

    def answer() -> None:
        started.wait()
        for unit in units:
            store.put(cell.fingerprint, unit.keys[0], {})

    other = threading.Thread(target=answer)
    other.start()
    started.set()
    Processes(0, 2).wait(units, [cell], store, patience=60, poll=0.01)
    other.join()
    assert all(store.get(cell.fingerprint, unit.keys[0]) == {} for unit in units)
