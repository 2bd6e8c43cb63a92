"""How many tokens have come since the shapes of a cache were fixed: a number on the device, which no host asks for."""

from __future__ import annotations

import torch
from torch import Tensor


class Steps:
    """One count for all buffers of a cache, on every device that has some.

    Args:
        room: the most tokens that may come.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._taken: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The count on a device, (1,) int64; whoever holds it sees it go on."""
        if device not in self._taken:
            self._taken[device] = torch.zeros(1, dtype=torch.long, device=device)
            torch._dynamo.mark_static_address(self._taken[device])
        return self._taken[device]

    def advance(self) -> None:
        """One more token has come."""
        for taken in self._taken.values():
            taken.add_(1)

    def count(self) -> int:
        """Tokens so far; the host waits for the device."""
        return int(next(iter(self._taken.values())))
