"""Where the compiled kernels become operators of torch: `torch.compile` can trace a decode step that calls them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from kvgauge.kernels.cpu.library import available

OPERATORS = torch.library.Library("kvgauge", "FRAGMENT")

Result = TypeVar("Result")


def compiled_for(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> bool:
    """The kernels can take these tensors: on the CPU, all of one of `dtypes`, and no gradient is asked of them."""
    return (
        all(tensor.device.type == "cpu" and tensor.dtype == tensors[0].dtype for tensor in tensors)
        and tensors[0].dtype in dtypes
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and available()
    )


def run(operator: Callable[..., Result], implementation: Callable[..., Result], *arguments: object) -> Result:
    """The operator where a graph is traced or a profiler looks, else its implementation.

    On small caches torch's dispatch of an operator written in Python costs as much as the kernel.
    """
    seen = torch.compiler.is_compiling() or torch.autograd._profiler_enabled()
    return operator(*arguments) if seen else implementation(*arguments)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Of the first number of a tensor; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
