"""Where the compiled kernels become operators of torch: `torch.compile` can trace a decode step that calls them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

OPERATORS = torch.library.Library("kvgauge", "FRAGMENT")


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Of the first number of a tensor; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
