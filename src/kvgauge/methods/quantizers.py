"""Quantisers: the last member of a composition, which decides in how many bits the others' numbers are kept."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvgauge.contract.roles import StorageQuantizer
from kvgauge.errors import UserError, unknown
from kvgauge.store.quantized_values import BITS
from kvgauge.store.storage import AXES, QuantizedStorage


@dataclass(frozen=True, kw_only=True)
class UniformQuantizer(StorageQuantizer):
    """Asymmetric uniform quantisation in groups; see `kvgauge.store.quantized_rows`.

    Attributes:
        bits: of a number: 8, 4, 3 or 2.
        axis: ``token``: a group is a run of channels of one token; ``channel``: one channel of a run of tokens; None
            for what suits the numbers: channels for latents and for keys that are kept whole, else tokens.
        group: numbers of a group: channels, or tokens.
        balance: divide every channel by its root mean square over the context first; None: yes along the token axis,
            which helps the bases of xkv; with latents of per-head methods on the token axis, try false.

    Raises:
        UserError: values out of range, or balanced channels along the channel axis.
    """

    bits: int
    axis: str | None = None
    group: int = 64
    balance: bool | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            choices = ", ".join(map(str, BITS))
            raise UserError(f"bits {self.bits} of a quantiser: there is storage for {choices} bits, choose one of them")
        if self.axis is not None and self.axis not in AXES:
            raise unknown("axis of a quantiser", str(self.axis), AXES)
        if self.group < 1:
            raise UserError(f"group {self.group} of {self.label} is below 1: it is a number of channels or tokens")
        if self.balance and self.axis == "channel":
            raise UserError(f"balance of {self.label} has no use with axis: channel: every channel has its own grid")

    @property
    def bit_choices(self) -> tuple[int, ...]:
        return tuple(sorted(BITS))

    @property
    def label(self) -> str:
        return f"int{self.bits}"

    def storage(self) -> QuantizedStorage:
        return QuantizedStorage(self.bits, self.axis, self.group, self.balance is not False)

    def config(self) -> dict[str, Any]:
        """The fields as JSON-like data."""
        return asdict(self)
