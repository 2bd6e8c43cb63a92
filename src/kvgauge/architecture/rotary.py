"""Rotary position embedding as a function of positions, forwards and backwards.

transformers rotates keys before a cache sees them. The rotation is orthogonal up to the model's attention scaling
factor, so what a cache receives can be turned back exactly; methods that work on pre-RoPE keys do that here, whatever
the model family.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.errors import UserError

# Their frequencies change with the length of the sequence, so that an early key cannot be turned back later.
LENGTH_DEPENDENT = ("dynamic", "longrope")


class Rotary:
    """The rotary embedding of one model.

    Raises:
        UserError: the model has none, or one whose frequencies depend on the sequence length.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        module = getattr(model.get_decoder(), "rotary_emb", None)
        if module is None:
            raise UserError(f"{type(model).__name__} has no rotary embedding: choose a method that keeps `rope: post`")
        kind = getattr(module, "rope_type", "default")
        if kind in LENGTH_DEPENDENT:
            raise UserError(f"rope type {kind!r} changes with the sequence length: choose a method with `rope: post`")
        self._module = module
        self._scale_squared = float(getattr(module, "attention_scaling", 1.0)) ** 2

    def angles(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for `positions` (batch, tokens): two tensors (batch, 1, tokens, head_dim)."""
        cos, sin = self._module(like, position_ids=positions)
        return cos.unsqueeze(1), sin.unsqueeze(1)

    def rotate(self, states: Tensor, positions: Tensor) -> Tensor:
        """Pre-RoPE states (batch, heads, tokens, head_dim) at `positions` (batch, tokens), rotated."""
        cos, sin = self.angles(positions, states)
        return states * cos + rotate_half(states) * sin

    def unrotate(self, states: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `rotate`."""
        cos, sin = self.angles(positions, states)
        return (states * cos - rotate_half(states) * sin) / self._scale_squared

    def shift(self, states: Tensor, offsets: Tensor) -> Tensor:
        """Rotated states (batch, heads, tokens, head_dim), moved by `offsets` (batch or 1, tokens) positions.

        An offset of 0 returns exactly what came in; the model's attention scaling factor is left as it is.
        """
        return turn(states, self.turning(offsets, states))

    def turning(self, offsets: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """What `turn` needs to move states in the dtype of `like` by `offsets` (batch or 1, tokens) positions."""
        cos, sin = self.angles(offsets, like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32)))
        scale = self._scale_squared**0.5
        return cos / scale, sin / scale


def turn(states: Tensor, turning: tuple[Tensor, Tensor]) -> Tensor:
    """Rotated states (batch, heads, tokens, head_dim), moved as `Rotary.turning` says."""
    cos, sin = turning
    exact = states.to(cos.dtype)
    # x cos + rotate_half(x) sin, without a second tensor as large as the states
    shifted, half = exact * cos, states.shape[-1] // 2
    shifted[..., :half].addcmul_(exact[..., half:], sin[..., :half], value=-1.0)
    shifted[..., half:].addcmul_(exact[..., :half], sin[..., half:])
    return shifted.to(states.dtype)


def rotate_half(states: Tensor) -> Tensor:
    """(x1, x2) → (−x2, x1) on the halves of the last dimension, the convention of Llama, Mistral and Qwen."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
