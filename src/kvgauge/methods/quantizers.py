"""Quantisers: the last member of a composition, which decides in how many bits the others' numbers are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvgauge.contract.roles import StorageQuantizer
from kvgauge.errors import UserError, unknown
from kvgauge.store.quantized_values import BITS
from kvgauge.store.rotations import ROTATIONS
from kvgauge.store.storage import AXES, QuantizedStorage, TurboStorage


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
        rotate: ``hadamard`` or ``orthogonal``: rows are turned by a fixed random rotation first, which makes their
            channels alike: groups are then of channels, and nothing is balanced. None turns nothing.

    Raises:
        UserError: values out of range, or balanced or rotated channels along the channel axis.
    """

    bits: int
    axis: str | None = None
    group: int = 64
    balance: bool | None = None
    rotate: str | None = None

    def __post_init__(self) -> None:
        _check_bits(self.bits, BITS)
        if self.axis is not None and self.axis not in AXES:
            raise unknown("axis of a quantiser", str(self.axis), AXES)
        if self.group < 1:
            raise UserError(f"group {self.group} of {self.label} is below 1: it is a number of channels or tokens")
        if self.balance and self.axis == "channel":
            raise UserError(f"balance of {self.label} has no use with axis: channel: every channel has its own grid")
        _check_rotation(self.label, self.rotate)
        if self.rotate is not None and (self.axis == "channel" or self.balance):
            raise UserError(
                f"rotate of {self.label} makes all channels alike, which leaves nothing to axis: channel and to "
                f"balance: leave them out"
            )

    @property
    def bit_choices(self) -> tuple[int, ...]:
        return tuple(sorted(BITS))

    @property
    def label(self) -> str:
        return f"int{self.bits}" + ("" if self.rotate is None else f"-{self.rotate}")

    def storage(self) -> QuantizedStorage:
        if self.rotate is not None:
            return QuantizedStorage(self.bits, "token", self.group, False, rotate=self.rotate)
        return QuantizedStorage(self.bits, self.axis, self.group, self.balance is not False)

    def config(self) -> dict[str, Any]:
        """The fields as JSON-like data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Kivi(StorageQuantizer):
    """KIVI (arXiv 2402.02750): asymmetric uniform codes, an exact window of recent tokens, nothing to tune.

    Keys are quantised per channel in groups of tokens, values per token in groups of channels. Latents of per-head
    methods are quantised per channel, bases of xkv per token. Tokens leave the window a group at a time.

    Attributes:
        bits: of a number: 8, 4, 3 or 2; the paper's are 4 and 2.
        group: numbers of a group.
        residual: most recent tokens that stay in 16 bits, whole groups; the paper's are 32 to 128.

    Raises:
        UserError: values out of range, or a window that is no number of groups.
    """

    bits: int = 2
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        _check_bits(self.bits, BITS)
        if self.group < 1:
            raise UserError(f"group {self.group} of kivi is below 1: it is a number of tokens, and of channels")
        if self.residual < 0 or self.residual % self.group:
            below = max(0, self.residual) // self.group * self.group
            raise UserError(
                f"residual {self.residual} of kivi is no number of groups of {self.group} tokens, which leave the "
                f"window together: give {below} or {below + self.group}"
            )

    @property
    def bit_choices(self) -> tuple[int, ...]:
        return tuple(sorted(BITS))

    @property
    def label(self) -> str:
        return f"kivi{self.bits}"

    def storage(self) -> QuantizedStorage:
        return QuantizedStorage(self.bits, None, self.group, False, window=self.residual)

    def config(self) -> dict[str, Any]:
        """The fields as JSON-like data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TurboQuant(StorageQuantizer):
    """TurboQuant (arXiv 2504.19874): rotated directions on a Lloyd–Max code book; see `kvgauge.store.turbo_rows`.

    Attributes:
        bits: of a number: 2, 2.5, 3, 3.5 or 4.
        key_bits, value_bits: of keys and of values, where they differ from `bits`.
        mode: ``mse``: all bits are codes; ``prod``: one of them is the sign of a projected residual (QJL), which makes
            inner products unbiased.
        rotate: ``orthogonal``, or ``hadamard`` with random signs.
        seed: of the rotation.

    Raises:
        UserError: values out of range.
    """

    bits: float = 3
    key_bits: float | None = None
    value_bits: float | None = None
    mode: str = "mse"
    rotate: str = "orthogonal"
    seed: int = 0

    def __post_init__(self) -> None:
        for bits in (self.bits, self.key_bits, self.value_bits):
            if bits is not None:
                _check_bits(bits, TURBO_BITS)
        if self.mode not in TURBO_MODES:
            raise unknown("mode of turboquant", str(self.mode), TURBO_MODES)
        _check_rotation("turboquant", self.rotate)

    @property
    def bit_choices(self) -> tuple[float, ...]:
        return TURBO_BITS

    @property
    def label(self) -> str:
        keys, values = self._pair()
        bits = f"{keys:g}" if keys == values else f"k{keys:g}v{values:g}"
        return f"turboquant{bits}" if self.mode == "mse" else f"turboquant-{self.mode}{bits}"

    def _pair(self) -> tuple[float, float]:
        return self.key_bits or self.bits, self.value_bits or self.bits

    def storage(self) -> TurboStorage:
        keys, values = self._pair()
        return TurboStorage(keys, values, self.mode == "prod", self.rotate, self.seed)

    def config(self) -> dict[str, Any]:
        """The fields as JSON-like data."""
        return asdict(self)


TURBO_BITS = (2, 2.5, 3, 3.5, 4)
TURBO_MODES = ("mse", "prod")


def _check_bits(bits: float, choices: Sequence[float]) -> None:
    if bits not in choices:
        listed = ", ".join(f"{choice:g}" for choice in sorted(choices))
        raise UserError(f"bits {bits:g} of a quantiser: there is storage for {listed} bits, choose one of them")


def _check_rotation(name: str, rotate: str | None) -> None:
    if rotate is not None and rotate not in ROTATIONS:
        raise unknown(f"rotate of {name}", str(rotate), ROTATIONS)
