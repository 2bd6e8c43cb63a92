"""Linear layers that multiply a handful of rows at the speed of memory.

A decode step multiplies every weight matrix with as many rows as there are sequences. On a CPU in float32 the product
in the order of ``x Wᵀ`` reads the weights at a fraction of the speed of memory, ``W xᵀ``, the same numbers transposed,
at a larger one as a rule, and the compiled product at most of it. `kvgauge.measure.narrow_products` measures all three.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvgauge.native.narrow_product import narrow_product

# One row is a matrix-vector product, fast in either order; from here on, both orders are bound by arithmetic.
MOST_ROWS = 64

MOST_COMPILED = 16  # rows; more are bound by arithmetic, which BLAS does better


class NarrowLinear(nn.Linear):
    """A linear layer whose product is taken in the faster order where there are few rows."""

    def forward(self, input: Tensor) -> Tensor:
        """Rows (…, in_features) to (…, out_features)."""
        rows = input.numel() // self.in_features
        if not 1 < rows <= MOST_ROWS or input.device.type != "cpu" or input.dtype != torch.float32:
            return super().forward(input)
        flat = input.reshape(rows, self.in_features)
        output = narrow_product(flat, self.weight) if rows <= MOST_COMPILED else None
        if output is None:
            output = transposed_product(flat, self.weight)
        if self.bias is not None:
            output += self.bias
        return output.view(*input.shape[:-1], self.out_features)


def transposed_product(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows @ weightᵀ`` (rows, out_features), computed as ``(weight @ rowsᵀ)ᵀ``."""
    return torch.mm(weight, rows.t()).t().contiguous()


def install(model: PreTrainedModel) -> None:
    """Give every plain linear layer of `model` the faster order; weights and results stay, up to rounding."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = NarrowLinear


def remove(model: PreTrainedModel) -> None:
    """Undo `install`."""
    for module in model.modules():
        if type(module) is NarrowLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]  # the class it had before
