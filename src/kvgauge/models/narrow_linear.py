"""Linear layers that multiply a handful of rows at the speed of memory.

A decode step multiplies every weight matrix with as many rows as there are sequences. On a CPU in float32 the product
in the order of ``x Wᵀ`` reads the weights at a fraction of the speed of memory, ``W xᵀ``, the same numbers transposed,
at a larger one on some processors, and the compiled product at most of it; in bfloat16 ``x Wᵀ`` rearranges the weights
in every call. `pipelines.studies.narrow_products` measures all three.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvgauge.kernels.cpu.narrow_product import narrow_product

# Of a float32 row BLAS makes a matrix-vector product, which is as fast; from MOST_ROWS on, all are bound by arithmetic.
MOST_ROWS = 64

# From so many rows to so many; more of them BLAS multiplies faster.
COMPILED = {torch.float32: (2, 16), torch.bfloat16: (1, 8)}
NEVER = (1, 0)


class NarrowLinear(nn.Linear):
    """A linear layer whose product is taken in the faster order where there are few rows."""

    def forward(self, input: Tensor) -> Tensor:
        """Rows (…, in_features) to (…, out_features)."""
        rows = input.numel() // self.in_features
        least, most = COMPILED.get(input.dtype, NEVER)
        compiled = least <= rows <= most
        transposed = input.dtype == torch.float32 and 1 < rows <= MOST_ROWS
        if input.device.type != "cpu" or not (compiled or transposed):
            return super().forward(input)
        flat = input.reshape(rows, self.in_features)
        output = narrow_product(flat, self.weight) if compiled else None
        if output is None:
            if not transposed:
                return super().forward(input)
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
