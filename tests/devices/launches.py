"""The table of what a decode step launches on devices, per layer: `python -m tests.devices.launches` writes it anew.

A kernel launch takes the host some microseconds, whatever there is to compute: below about 10 ms a step it is launches
that are measured, not memory.
"""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

import kvgauge
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.fitting import learns
from kvgauge.contract.method import Method
from kvgauge.errors import UserError
from kvgauge.simulation.running import Run, run_on_devices
from kvgauge.testing import fit_on_random_tokens
from tests.devices.cases import CASES

MODEL = "tiny/llama"
TABLE = Path(__file__).with_name("launches.tsv")
PLACEMENTS = {
    "one": (["cuda:0"], False),
    "two": (["cuda:0", "cuda:1"], False),
    "one padded": (["cuda:0"], True),
    "two padded": (["cuda:0", "cuda:1"], True),
}


@cache
def prepared(case: str) -> tuple[Method, Fitted | None]:
    """A method, and what it learns of the model."""
    name, options = CASES[case]
    method = kvgauge.build_method(name, **options)
    model = kvgauge.load_model(MODEL)[0]
    return method, fit_on_random_tokens(method, model) if learns(method) else None


def run(case: str, placement: str) -> Run:
    """One case at one placement."""
    method, fitted = prepared(case)
    devices, padded = PLACEMENTS[placement]
    return run_on_devices(method, kvgauge.load_model(MODEL)[0], fitted, devices, padded=padded)


def measured(found: Run) -> dict[str, float]:
    """What the table says of a run."""
    assert found.step is not None
    layers = kvgauge.load_model(MODEL)[0].config.num_hidden_layers
    return {
        "launches": found.step.launches / layers,
        "syncs": found.step.syncs.total(),
        "uploads": found.step.uploads.total(),
        "transfers": found.step.transfers.total(),
    }


def read() -> dict[tuple[str, str], dict[str, float]]:
    """The table: of case and placement, launches per layer and the whole step's syncs, uploads and transfers."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return {
        (row.pop("case"), row.pop("placement")): {name: float(value) for name, value in row.items()} for row in rows
    }


def write() -> None:
    """The table as it is now."""
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(["case", "placement", "launches", "syncs", "uploads", "transfers"])
        for case in CASES:
            for placement in PLACEMENTS:
                try:
                    table.writerow(
                        [case, placement, *(f"{value:g}" for value in measured(run(case, placement)).values())]
                    )
                except UserError:
                    continue  # refused: there is no step


if __name__ == "__main__":
    write()
