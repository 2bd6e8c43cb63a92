"""How many tokens an entry stands for, as a bias on its scores.

A softmax of ``s + ln c`` is attention to c tokens with the same key (AsymKV, arXiv 2506.05410).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Added to the scores of what is not there. Finite, so that the row of a padding query stays a number.
HIDDEN = -1e30


def log_cardinalities(cardinalities: Tensor, dtype: torch.dtype) -> Tensor:
    """Cardinalities as an additive bias on scores, shaped alike; 0, an empty place, becomes `HIDDEN`."""
    return torch.where(cardinalities > 0, cardinalities.clamp(min=1).to(dtype).log(), HIDDEN)
