"""A machine with GPUs that are simulated: real numbers, labelled devices, and what would have cost time is counted.

Operators run on the CPU tensors within. Where a GPU would refuse, because operands live on two devices or one of them
on the host, `MixedDevicesError` names the line. Nothing is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from kvgauge.simulation.tally import Tally, here
from kvgauge.simulation.tensor import ANYWHERE, MixedDevicesError, SimulatedTensor, simulated

CPU = torch.device("cpu")

WAITING = frozenset(
    {"_local_scalar_dense", "nonzero", "masked_select", "equal", "repeat_interleave", "_unique2", "unique_dim"}
    | {"unique_consecutive", "bincount", "_linalg_eigh", "_linalg_svd", "linalg_cholesky_ex", "linalg_inv_ex"}
    | {"linalg_lu_factor_ex", "linalg_ldl_factor_ex"}
)
"""Operators after which the host knows something of the numbers; factorisations, for which it asks if they worked."""

COPIES = frozenset({"_to_copy", "copy_"})
INDEXED = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})
IDLE = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "set_", "_unsafe_view"})
"""Beside views and what the host reads: operators that launch nothing."""

FLASH_DIM = 256  # the largest head that flash attention takes


class SimulatedMachine(TorchDispatchMode):
    """A context in which devices of the name ``cuda:N`` exist.

    Args:
        memory: bytes of each device.

    Attributes:
        tally: of the work since `restart`.
    """

    def __init__(self, memory: int = 80 * 2**30) -> None:
        super().__init__()
        self.tally = Tally()
        self._calls = _Calls(self)
        self._fused = False
        self._restore: list[tuple[Any, str, Any]] = []
        self._memory = memory

    def restart(self) -> Tally:
        """Count anew; what was counted until now."""
        done, self.tally = self.tally, Tally()
        return done

    def __enter__(self) -> SimulatedMachine:
        assert SimulatedTensor.machine is None, "a simulated machine within another"
        SimulatedTensor.machine = self
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        # of a generation that is too old for the kernels that others choose by it, and that are not here
        properties = SimpleNamespace(total_memory=self._memory, major=7, minor=5)
        replaced: dict[str, Callable[..., Any]] = {
            "_lazy_init": lambda: None,
            "synchronize": self._synchronize,
            "get_device_properties": lambda device=None: properties,
            "mem_get_info": lambda device=None: (self._memory, self._memory),
        }
        for name, function in replaced.items():
            self._restore.append((torch.cuda, name, getattr(torch.cuda, name)))
            setattr(torch.cuda, name, function)
        CausalBias.__new__ = staticmethod(_unwatched)  # type: ignore[method-assign,assignment]
        super().__enter__()
        self._calls.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._calls.__exit__(*exception)
        super().__exit__(*exception)
        del CausalBias.__new__  # what it inherits is back
        while self._restore:
            setattr(*self._restore.pop())
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        SimulatedTensor.machine = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.compute(func, args, kwargs or {})

    def _synchronize(self, device: Any = None) -> None:
        self.tally.syncs[f"{here()} synchronize"] += 1

    # -- one operator --------------------------------------------------------------------------------------------

    def compute(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What a device makes of an operator; plain tensors are left to torch."""
        flat, spec = tree_flatten((args, kwargs))
        asked = next((item for item in flat if isinstance(item, torch.device)), None)
        if asked is not None and asked.type == "cuda" and asked.index is None:
            asked = torch.device("cuda", 0)
        if not any(isinstance(item, SimulatedTensor) for item in flat) and (asked is None or asked.type == "cpu"):
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        label, busy = self._where(name, args, flat, asked)
        if not busy:
            return simulated(args[0].numbers, label)
        plain = [_plain(item) for item in flat]
        plain_args, plain_kwargs = tree_unflatten(plain, spec)
        plain_kwargs.pop("pin_memory", None)
        out = _computed(func, name, plain_args, plain_kwargs)
        self._count(func, name, plain_kwargs)
        if label.type == "cpu":
            return args[0] if name == "copy_" else out
        return self._labelled(func, name, args, kwargs, out, label)

    def _where(self, name: str, args: tuple, flat: list[Any], asked: torch.device | None) -> tuple[torch.device, bool]:
        """The device of the result, and whether there is anything to do: a tensor may be there already."""
        if name in COPIES:
            source, target = (args[1], args[0].device) if name == "copy_" else (args[0], asked)
            target = source.device if target is None else target
            if ANYWHERE in (source.device, target):
                target = source.device if target == ANYWHERE else target
            elif source.device != target:
                self._moved(source.device, target)
            there = isinstance(source, SimulatedTensor) and source.device == target
            return target, not (there and name == "_to_copy" and not _casts(flat, source))
        tensors = [item for item in flat if isinstance(item, Tensor)]
        devices = {item.label for item in tensors if isinstance(item, SimulatedTensor)} - {ANYWHERE}
        hosts = [item for item in tensors if not isinstance(item, SimulatedTensor) and item.dim()]
        if name in INDEXED and isinstance(args[0], SimulatedTensor):
            index = [item for item in args[1] if item is not None]
            if any(not isinstance(item, SimulatedTensor) for item in index):
                self.tally.uploads[f"{here()} index"] += 1
            hosts = [item for item in hosts if not any(item is one for one in index)]
            if any(item.dtype == torch.bool for item in index):
                self.tally.syncs[f"{here()} index by a mask"] += 1
        if len(devices) > 1 or (devices and hosts):
            names = [*sorted(map(str, devices)), *(["cpu"] if hosts else [])]
            raise MixedDevicesError(f"{here()}: {name} of tensors on {' and '.join(names)}")
        return asked or next(iter(devices), ANYWHERE), True

    def _moved(self, source: torch.device, target: torch.device) -> None:
        what = f"{here()} {source} to {target}"
        if target == CPU:
            self.tally.syncs[what] += 1
        elif source == CPU:
            self.tally.uploads[what] += 1
        else:
            self.tally.transfers[what] += 1

    def _count(self, func: Any, name: str, kwargs: dict[str, Any]) -> None:
        if name in WAITING and kwargs.get("output_size") is None:
            self.tally.syncs[f"{here()} {name}"] += 1
        idle = func.is_view or name in IDLE or name == "_local_scalar_dense" or name.startswith("sym_")
        if not idle and not self._fused:
            self.tally.kernels[name] += 1

    def _labelled(
        self, func: Any, name: str, args: tuple, kwargs: dict[str, Any], out: Any, label: torch.device
    ) -> Any:
        if isinstance(kwargs.get("out"), SimulatedTensor):
            return kwargs["out"]
        result = tree_map_only(Tensor, lambda tensor: simulated(tensor, label), out)
        changed = func.is_view or any(alias.is_write for alias in map(_alias, func._schema.arguments) if alias)
        own = any(isinstance(item, SimulatedTensor) for item in tree_flatten((args, kwargs))[0])
        return return_and_correct_aliasing(func, args, kwargs, result) if changed and own else result

    # -- attention -----------------------------------------------------------------------------------------------

    def attend(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Scaled dot product attention: one kernel where CUDA has one, else what torch makes of it."""
        query, key, value, mask = (*args, *([None] * (4 - len(args))))[:4]
        mask = kwargs.get("attn_mask", mask)
        kind = _kernel(query, key, value, mask, bool(kwargs.get("enable_gqa")))
        self.tally.attention[kind] += 1
        if kind == "math":
            return func(*args, **kwargs)
        self.tally.kernels[f"attention ({kind})"] += 1
        self._fused = True
        try:
            return func(*args, **kwargs)
        finally:
            self._fused = False


class _Calls(TorchFunctionMode):
    """What torch decides in C++ by the device that it takes a tensor for, before there is an operator."""

    def __init__(self, machine: SimulatedMachine) -> None:
        super().__init__()
        self.machine = machine

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        own = bool(args) and isinstance(args[0], SimulatedTensor)
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], SimulatedTensor):
            return args[0].to(args[1].label, args[1].dtype, *args[2:], **kwargs)
        if func is functional.scaled_dot_product_attention and own:
            return self.machine.attend(func, args, kwargs)
        if own and func is Tensor.tolist:
            self.machine.tally.syncs[f"{here()} tolist"] += 1
            return args[0].numbers.tolist()
        if own and func is Tensor.new_tensor:
            data, options = args[1], {"dtype": args[0].dtype, "device": args[0].label} | kwargs
            return torch.tensor(data, **options)
        if own and func in (Tensor.__getitem__, Tensor.__setitem__):
            return func(args[0], _tensors_for_lists(args[1]), *args[2:])
        if own and func is Tensor.numpy:
            raise TypeError(f"{here()}: a tensor on {args[0].label} has no numpy array: use cpu() first")
        return func(*args, **kwargs)


def _unwatched(cls: type[Tensor], *_: Any) -> Tensor:
    """A tensor of a subclass, as torch makes it where no mode looks on: it wants to be the first to see it."""
    with _disable_current_modes():
        return Tensor.__new__(cls)


def _computed(func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operator on the CPU, where it is not what it is on a GPU."""
    if name == "_conj":  # a wrapper cannot carry torch's mark of a conjugate that is still to be taken
        return args[0].conj_physical()
    if name == "histc" and not args[0].is_floating_point():  # CUDA counts integers
        return func(args[0].double(), *args[1:], **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


def _plain(item: Any) -> Any:
    if isinstance(item, SimulatedTensor):
        return item.numbers
    return CPU if isinstance(item, torch.device) else item


def _casts(flat: list[Any], source: Tensor) -> bool:
    return any(isinstance(item, torch.dtype) and item != source.dtype for item in flat)


def _alias(argument: Any) -> Any:
    return argument.alias_info


def _tensors_for_lists(index: Any) -> Any:
    """C++ would make the index of a list on `meta`, without its numbers."""
    if isinstance(index, tuple):
        return tuple(torch.tensor(part) if isinstance(part, list) else part for part in index)
    return torch.tensor(index) if isinstance(index, list) else index


def _kernel(query: Tensor, key: Tensor, value: Tensor, mask: Any, grouped: bool) -> str:
    """The kernel that CUDA takes for 16-bit numbers.

    Flash attention knows no masks, and one head_dim for keys and values; the efficient kernel knows no groups; a causal
    bias (`torch.nn.attention.bias`) is no mask of numbers.
    """
    mask = None if isinstance(mask, CausalBias) else mask
    if mask is None and query.shape[-1] == value.shape[-1] <= FLASH_DIM and key.stride(-1) == value.stride(-1) == 1:
        return "flash"
    return "math" if grouped and query.shape[1] != key.shape[1] else "efficient"
