"""What a machine counts while it computes."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
OWN = Path(__file__).parent


@dataclass
class Tally:
    """Work of simulated devices.

    Attributes:
        kernels: launches by operator; a fused attention is one.
        syncs: where the host waited for a device: it read a number, or the size of a result depended on the numbers.
        uploads: where numbers went from the host to a device.
        transfers: where they went from one device to another.
        attention: calls of scaled dot product attention by the kernel that CUDA would take in 16 bits: ``flash``,
            ``efficient`` or ``math``.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    transfers: Counter[str] = field(default_factory=Counter)
    attention: Counter[str] = field(default_factory=Counter)

    @property
    def launches(self) -> int:
        """Kernels in all."""
        return self.kernels.total()


def here() -> str:
    """File and line of the call that is being computed: the innermost of this package, else of transformers."""
    frame, other = sys._getframe(1), None
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE) and not path.is_relative_to(OWN):
            return f"{path.relative_to(PACKAGE)}:{frame.f_lineno}"
        if other is None and "transformers" in path.parts:
            inside = path.parts[len(path.parts) - path.parts[::-1].index("transformers") :]
            other = f"transformers/{'/'.join(inside)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return other or "elsewhere"
