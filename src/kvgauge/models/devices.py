"""The device that a model goes to, and what can stand in the way: one line before anything is loaded, or instead."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from kvgauge.errors import UserError, unknown
from kvgauge.models.identity import weights_nbytes

KINDS = ("auto", "cpu", "cuda", "cuda:0", "mps", "xpu")


def parse_device(name: str) -> torch.device:
    """A device by its name; ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        UserError: no device can have that name, or none that holds numbers.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown("device", name, KINDS) from None
    if device.type == "meta":
        raise UserError("device meta holds no numbers: use cpu, cuda or auto")
    return device


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a device that is not here, or that does not compute in `dtype`.

    Raises:
        UserError: as said.
    """
    if device.type == "cuda":
        _check_cuda(device)
    try:
        torch.zeros(1, 1, device=device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"device {device} does not work with torch {torch.__version__} ({_line(error)})") from error
    name = str(dtype).removeprefix("torch.")
    try:
        one = torch.ones(1, 1, dtype=dtype, device=device)
        one @ one
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise UserError(f"device {device} does not compute in {name} ({_line(error)}): choose another dtype") from error


def _check_cuda(device: torch.device) -> None:
    if not torch.cuda.is_available():
        build = "was built without CUDA" if torch.version.cuda is None else "finds no GPU"
        raise UserError(f"device {device}: torch {torch.__version__} {build}, use device=cpu or another torch")
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        last = "" if count == 1 else f" … cuda:{count - 1}"
        raise UserError(f"device {device}: this machine has cuda:0{last}")


def moved(model: PreTrainedModel, device: torch.device, name: str) -> PreTrainedModel:
    """The model on a device.

    Args:
        model: loaded, on the CPU.
        device: that `check_device` accepts.
        name: of the model, for the error message.

    Raises:
        UserError: it does not fit.
    """
    try:
        return model.to(device)
    except torch.OutOfMemoryError as error:
        raise too_large(name, device, weights_nbytes(model)) from error


def too_large(name: str, device: torch.device | str, nbytes: int | None = None) -> UserError:
    """A model whose weights do not fit."""
    size = "" if nbytes is None else f" of {nbytes / 2**30:.1f} GiB"
    return UserError(
        f"model {name}: weights{size} do not fit on {device}: use a 16-bit dtype, weights of fewer bits, "
        f"or device_map=auto over several GPUs"
    )


def check_whole(model: PreTrainedModel) -> None:
    """Refuse a tensor-parallel model: each process has a part of the heads, and what it cached would count as all.

    Raises:
        UserError: its weights are split over processes.
    """
    if getattr(model, "_tp_size", None) not in (None, 1) or any(
        hasattr(parameter, "device_mesh") for parameter in model.parameters()
    ):
        raise UserError(
            f"{type(model).__name__} is tensor-parallel (tp_plan): its heads are split over processes, and caches of a "
            f"part are not measured: load it with device_map=auto instead"
        )


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:120]
