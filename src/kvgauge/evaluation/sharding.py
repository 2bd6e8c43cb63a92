"""Several processes on one evaluation: each takes its share of the units, and they meet in the answer store.

There are no collectives, hence none that a dead process could leave hanging, no padding to equal counts, and no
difference to what one process computes: process r of n answers units r, r + n, r + 2n, … and ends; process 0 then waits
until every answer is in the store, and writes the results. Processes on several nodes need a shared file system.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvgauge.errors import UserError
from kvgauge.evaluation.cell import Cell
from kvgauge.evaluation.engine import missing
from kvgauge.evaluation.store import AnswerStore
from kvgauge.evaluation.units import Unit

POLL_S = 0.5

# (rank, size, rank on the node) as torchrun and `accelerate launch` tell them, and as `srun` does. SLURM_NTASKS would
# be wrong: it is set in a batch script too, which is one process.
_VARIABLES = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))


@dataclass(frozen=True)
class Processes:
    """This process among those of one launch.

    Attributes:
        rank: its number.
        size: how many there are.
        local_rank: its number on its node.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str] | None = None) -> Processes:
        """What a launcher said in the environment; a single process where there is none.

        Raises:
            UserError: it said no numbers.
        """
        known = os.environ if environment is None else environment
        for names in _VARIABLES:
            if all(name in known for name in names):
                try:
                    rank, size, local_rank = (int(known[name]) for name in names)
                except ValueError as error:
                    said = ", ".join(f"{name}={known[name]}" for name in names)
                    raise UserError(f"{said} in the environment are no numbers: unset them") from error
                return cls(rank, size, local_rank)
        return cls()

    @property
    def leads(self) -> bool:
        """Whether it writes the results."""
        return self.rank == 0

    def share(self, units: Sequence[Unit]) -> list[Unit]:
        """The units that it answers."""
        return list(units[self.rank :: self.size])

    def wait(
        self, units: Sequence[Unit], cells: Sequence[Cell], store: AnswerStore, patience: float, poll: float = POLL_S
    ) -> None:
        """Return when all cells have answered all units.

        Args:
            units, cells, store: of the run.
            patience: seconds without a new answer after which the others are given up.
            poll: seconds between two looks at the store.

        Raises:
            UserError: nothing new arrived for `patience` seconds.
        """
        waiting = [(number, unit, cell) for number, unit in enumerate(units) for cell in cells]
        last = time.monotonic()
        while True:
            left = [entry for entry in waiting if missing(entry[1], [entry[2]], store)]
            if not left:
                return
            if len(left) < len(waiting):
                last = time.monotonic()
            elif time.monotonic() - last > patience:
                silent = sorted({number % self.size for number, _, _ in left})
                raise UserError(
                    f"process {', '.join(map(str, silent))} of {self.size} gave no answer for {patience:g} s, "
                    f"{len(left)} are missing: all others are stored; run the same command again for the rest"
                )
            waiting = left
            time.sleep(poll)
