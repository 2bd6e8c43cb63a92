"""Rotary embedding as multiplication by unit complex numbers, for caches that rotate rebuilt keys again.

A head is d/2 planes; position p turns plane i by the angle ``p·θ_i``. Two facts make decoding cheap: rotations of one
plane commute and add up, so that the rotation by ``start + offset`` splits into one of the query (by ``−start``) and
one of the key (by ``offset``), for which a single small table serves every block of tokens; and a rotation common to
all tokens of a sequence changes no singular value, so that the column of a token may stand for its position.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1024  # tokens whose keys are rebuilt at once: a block stays in the processor's cache


class PlaneRotation:
    """Rotations by column index, exact inverses of each other.

    Args:
        frequencies: θ, (head_dim / 2,), radians per position.
    """

    def __init__(self, frequencies: Tensor) -> None:
        self.frequencies = frequencies.double()
        self._placed: dict[torch.device, Tensor] = {}  # the frequencies on devices
        # on every device whose layers it turns: columns 0 … BLOCK − 1, and multiples of BLOCK
        self._fine: dict[torch.device, Tensor] = {}
        self._coarse: dict[torch.device, Tensor] = {}

    def phases(self, columns: Tensor) -> Tensor:
        """``exp(i·column·θ)`` in complex64: (…, head_dim / 2) for integer columns (…)."""
        # float64 angles: at column 100,000 a float32 angle is off by 0.004 radians
        frequencies = self._placed.setdefault(columns.device, self.frequencies.to(columns.device))
        angles = columns.unsqueeze(-1).double() * frequencies
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

    def offsets(self, count: int, device: torch.device) -> Tensor:
        """Phases of the columns 0 … count − 1, count ≤ `BLOCK`: (count, head_dim / 2), from a table made once."""
        if device not in self._fine:
            self._fine[device] = self.phases(torch.arange(BLOCK, device=device))
        return self._fine[device][:count]

    def blocks(self, count: int, device: torch.device) -> Tensor:
        """Phases of the first columns of `count` blocks: (count, head_dim / 2), from a table that grows."""
        if device not in self._coarse or self._coarse[device].shape[0] < count:
            self._coarse[device] = self.phases(torch.arange(count, device=device) * BLOCK)
        return self._coarse[device][:count]

    def looked_up(self, columns: Tensor, tokens: int) -> Tensor:
        """`phases` of columns 0 … tokens − 1 from the two tables: no cosine is computed."""
        coarse, fine = self.blocks(tokens // BLOCK + 1, columns.device), self.offsets(BLOCK, columns.device)
        return coarse[columns // BLOCK] * fine[columns % BLOCK]

    def nbytes(self) -> int:
        return sum(table.nbytes for tables in (self._fine, self._coarse) for table in tables.values())


def to_planes(states: Tensor) -> Tensor:
    """(…, d) in the half-split convention of Llama, Mistral and Qwen as complex planes (…, d / 2)."""
    first, second = states.float().chunk(2, dim=-1)
    return torch.complex(first, second)


def from_planes(planes: Tensor) -> Tensor:
    """The inverse of `to_planes`, in float32."""
    return torch.cat((planes.real, planes.imag), dim=-1)


def interleaved(planes: Tensor) -> Tensor:
    """Planes (…, d / 2) as real numbers (…, d), real and imaginary parts side by side: a view."""
    return torch.view_as_real(planes).flatten(-2)


def planes_of(features: Tensor) -> Tensor:
    """The inverse of `interleaved` for contiguous float32 features (…, d): a view (…, d / 2)."""
    return torch.view_as_complex(features.unflatten(-1, (-1, 2)))
