"""Rotary position embedding as a function of positions, forwards and backwards, layer by layer.

transformers rotates keys before a cache sees them. The rotation is orthogonal up to the model's attention scaling
factor, so what a cache receives can be turned back exactly; methods that work on pre-RoPE keys do that here, whatever
the layer does: rotate a part of each head, rotate neighbours or halves, at one of several bases, or nothing at all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.architecture.facts import attention_device, model_facts
from kvgauge.architecture.rotations import layer_rotation


class Rotary:
    """The rotary embedding of one layer.

    States are the model's own unless `framed`; then they are in the layer's `HeadFrame`, where all rotations turn
    dimension i with dimension ``i + head_dim / 2``.

    Args:
        model: any decoder.
        layer: counted among the layers that may be compressed; None for all of them, if they do the same.
        framed: states are in the frame of the layer.

    Attributes:
        frame: of the layer, the same for `framed` rotations: what brings the model's states into it.
        theta: (head_dim / 2,), radians per position, in the order of the frame.

    Raises:
        UserError: how the layer turns its keys is not known, or depends on the length of a prompt that is not fixed yet
            (`kvgauge.architecture.prompt_length`), or the layers differ where `layer` is None.
    """

    def __init__(self, model: PreTrainedModel, layer: int | None = None, *, framed: bool = False) -> None:
        rotation = layer_rotation(model, layer)
        self.frame, self._framed = rotation.frame, framed
        self.device = model.device if layer is None else attention_device(model, layer)
        self.theta = rotation.theta.to(self.device, torch.float32)
        plain = bool((rotation.scaling == 1).all())
        self._scaling = None if plain else rotation.scaling.to(self.device, torch.float32)

    def angles(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for `positions` (batch, tokens), in the frame: two tensors (batch, 1, tokens, head_dim)."""
        # in float32, as models compute them: what was rotated by a rounded angle is turned back by the same
        angles = positions[..., None].float() * self.theta.to(positions.device)
        scaling = 1.0 if self._scaling is None else self._scaling.to(positions.device)
        cos, sin = ((part * scaling).repeat(1, 1, 2).to(like.dtype) for part in (angles.cos(), angles.sin()))
        return cos.unsqueeze(1), sin.unsqueeze(1)

    def rotate(self, states: Tensor, positions: Tensor, *, queries: bool = False) -> Tensor:
        """Pre-RoPE states (batch, heads, tokens, head_dim) of the frame, at `positions` (batch, tokens), rotated.

        A normalisation behind the rotation is part of it; keys and queries differ where there is one with weights.
        """
        cos, sin = self.angles(positions, states)
        rotated = states * cos + rotate_half(states) * sin
        if self._framed:
            return rotated
        return self.frame.model_queries(rotated) if queries else self.frame.model_keys(rotated)

    def unrotate(self, states: Tensor, positions: Tensor, *, queries: bool = False) -> Tensor:
        """The inverse of `rotate`: pre-RoPE states, in the frame."""
        if not self._framed:
            states = self.frame.queries(states) if queries else self.frame.keys(states)
        cos, sin = self.angles(positions, states)
        turned = states * cos - rotate_half(states) * sin
        return turned if self._scaling is None else turned / self._scaling.to(turned).square().repeat(2)

    def shift(self, states: Tensor, offsets: Tensor) -> Tensor:
        """Rotated keys (batch, heads, tokens, head_dim), moved by `offsets` (batch or 1, tokens) positions.

        An offset of 0 returns what came in; the model's attention scaling factor is left as it is.
        """
        if self._framed or self.frame.identity:
            return turn(states, self.turning(offsets, states))
        return self.frame.model_keys(turn(self.frame.keys(states), self.turning(offsets, states)))

    def turning(self, offsets: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """What `turn` needs to move states of the frame by `offsets` (batch or 1, tokens) positions."""
        like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        cos, sin = self.angles(offsets, like)
        if self._scaling is None:
            return cos, sin
        scaling = self._scaling.to(cos).repeat(2)
        return cos / scaling, sin / scaling


def layer_rotaries(model: PreTrainedModel) -> list[Rotary]:
    """The rotary embeddings of the layers that may be compressed, framed; those that do the same on a device share one.

    Raises:
        UserError: as `Rotary`.
    """
    found: list[Rotary] = []
    for layer in range(model_facts(model).num_layers):
        rotation, device = layer_rotation(model, layer), attention_device(model, layer)
        same = next(
            (
                index
                for index in range(layer)
                if found[index].device == device and layer_rotation(model, index).same_as(rotation)
            ),
            None,
        )
        found.append(Rotary(model, layer, framed=True) if same is None else found[same])
    return found


def turn(states: Tensor, turning: tuple[Tensor, Tensor]) -> Tensor:
    """Rotated states (batch, heads, tokens, head_dim) of a frame, moved as `Rotary.turning` says."""
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
