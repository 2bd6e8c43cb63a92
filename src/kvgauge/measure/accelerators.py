"""What the data sheets of accelerators say: memory, bandwidth, and what they compute."""

from __future__ import annotations

from dataclasses import dataclass

from kvgauge.errors import unknown


@dataclass(frozen=True)
class Accelerator:
    """A device.

    Attributes:
        name: for the table.
        nbytes: memory.
        bandwidth: of the memory, bytes per second.
        flops: dense products in 16 bits, operations per second.
        integer: 32-bit integer operations per second: what unpacking codes costs where nothing else is done.
        usable: share of the memory that is left beside the runtime and fragmentation.
    """

    name: str = "H100 SXM 80 GB"
    nbytes: int = 80 * 10**9
    bandwidth: float = 3.35e12
    flops: float = 990e12
    integer: float = 14.5e12
    usable: float = 0.94


ACCELERATORS = {
    "h100": Accelerator(),
    "h200": Accelerator("H200 SXM 141 GB", 141 * 10**9, 4.8e12, 990e12, 14.5e12),
    "a100": Accelerator("A100 SXM 80 GB", 80 * 10**9, 2.039e12, 312e12, 9.7e12),
    "l40s": Accelerator("L40S 48 GB", 48 * 10**9, 0.864e12, 362e12, 22.9e12),
    "rtx4090": Accelerator("RTX 4090 24 GB", 24 * 10**9, 1.008e12, 165e12, 20.6e12),
}


def accelerator(name: str) -> Accelerator:
    """The device of a name.

    Raises:
        UserError: there is none.
    """
    if name not in ACCELERATORS:
        raise unknown("accelerator", name, ACCELERATORS)
    return ACCELERATORS[name]
