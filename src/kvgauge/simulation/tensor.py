"""Tensors that say they live on a GPU and hold their numbers on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvgauge.simulation.machine import SimulatedMachine

ANYWHERE = torch.device("meta")
"""Of tensors that torch's own C++ makes beside another one, whose device it takes for `meta`: they go with any."""


class MixedDevicesError(RuntimeError):
    """Tensors of two devices met in one operator, which a GPU does not compute."""


class SimulatedTensor(Tensor):
    """A tensor of a `SimulatedMachine`.

    C++ takes it for a tensor on ``meta``: a build of torch without CUDA cannot even slice one on ``cuda``. Whoever asks
    in Python is told `label`.

    Args:
        numbers: the numbers, on the CPU.
        label: the device that it says it is on.
    """

    machine: SimulatedMachine | None = None  # the one that runs; without it nothing can be computed

    numbers: Tensor
    label: torch.device

    @staticmethod
    def __new__(cls, numbers: Tensor, label: torch.device) -> SimulatedTensor:
        made: SimulatedTensor = Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            layout=numbers.layout,
            device=ANYWHERE,
            requires_grad=False,
        )
        return made

    def __init__(self, numbers: Tensor, label: torch.device) -> None:
        self.numbers, self.label = numbers, label

    device = property(lambda self: self.label)
    is_cuda = property(lambda self: self.label.type == "cuda")
    is_meta = property(lambda self: False)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"SimulatedTensor({self.label}, {self.numbers!r})"

    def __format__(self, spec: str) -> str:
        return format(self.numbers, spec)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if SimulatedTensor.machine is None:
            raise RuntimeError(f"{func} of a simulated tensor outside its machine")
        return SimulatedTensor.machine.compute(func, args, kwargs or {})


def simulated(tensor: Tensor, device: torch.device | str) -> SimulatedTensor:
    """The numbers of a CPU tensor on a simulated device, shared with it."""
    return SimulatedTensor(tensor.detach(), torch.device(device))
