"""The rotation of one layer's keys, found by trying what its modules hold on what its own code makes of a token.

Names and classes say little about a rotation: two dimensions of a plane may be neighbours or a half apart, all of a
head may rotate or a part, a normalisation may follow. What the layer caches of one token at two positions says it all:
a rotation is the layer's if it turns the one into the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvgauge.architecture.head_frame import HeadFrame, plane_order

AGREES = {torch.float64: 3e-6, torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Largest relative error of keys turned by the right rotation; by a wrong one it is 0.3 and more."""


@dataclass(frozen=True, eq=False)
class Frequencies:
    """Rotary frequencies that a model holds.

    Attributes:
        source: the buffer that holds them, as ``rotary_emb.full_attention_inv_freq``.
        theta: (planes,), radians per position.
        scaling: the factor on cosines and sines.
        rope_type: ``default``, ``llama3``, ``yarn``, ``dynamic`` …
    """

    source: str
    theta: Tensor
    scaling: float = 1.0
    rope_type: str = "default"


@dataclass(frozen=True, eq=False)
class LayerRotation:
    """What a layer does to keys at a position.

    Attributes:
        theta: (head_dim / 2,), radians per position, in the order of `frame`; 0 in planes that do not rotate.
        scaling: (head_dim / 2,), the factor on the cosines and sines of a plane; 1 where it does not rotate.
        frame: which dimensions make a plane.
        rotary_dim: how many dimensions of a head rotate; 0 in a layer without rotary embedding.
        interleaved: a plane is two neighbours.
        source, rope_type: of the `Frequencies`; empty without rotary embedding.
        error: relative error of keys of the layer that were turned by this rotation.
    """

    theta: Tensor
    scaling: Tensor
    frame: HeadFrame
    rotary_dim: int
    interleaved: bool
    source: str
    rope_type: str
    error: float

    @property
    def normed_after(self) -> bool:
        """A normalisation with weights of its own follows the rotation."""
        return self.frame.weight is not None

    def same_as(self, other: LayerRotation) -> bool:
        """The two do the same."""
        return self.turns_as(other) and _same(self.frame.weight, other.frame.weight)

    def turns_as(self, other: LayerRotation) -> bool:
        """The two turn alike, whatever normalisations stand behind them."""
        pairs = ((self.theta, other.theta), (self.scaling, other.scaling), (self.frame.order, other.frame.order))
        return all(_same(first, second) for first, second in pairs)


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    return first is second or (first is not None and second is not None and torch.equal(first, second))


def held_frequencies(root: nn.Module, layer_type: str | None, module: nn.Module) -> list[Frequencies]:
    """The rotary frequencies in `root`, likeliest first: those of the layer's type, then the attention module's own."""
    inside = {id(child) for child in module.modules()}
    found: list[tuple[int, Frequencies]] = []
    for name, owner in root.named_modules():
        for key, buffer in owner.named_buffers(recurse=False):
            if not key.endswith("inv_freq") or "original" in key or buffer.dim() != 1:
                continue
            prefix = key.removesuffix("inv_freq")
            named = bool(prefix) and prefix.removesuffix("_") == layer_type
            rank = 0 if named else 1 if id(owner) in inside else 2
            found.append((rank, Frequencies(f"{name}.{key}", buffer, *_scaling_and_type(owner, prefix))))
    return [frequencies for _, frequencies in sorted(found, key=lambda pair: pair[0])]


def find_rotation(
    early: Tensor, late: Tensor, positions: tuple[int, int], held: list[Frequencies], module: nn.Module
) -> LayerRotation | None:
    """The rotation that turns `early` into `late`.

    Args:
        early, late: what the layer cached of the same tokens at the two positions, (tokens, heads, head_dim).
        positions: of the two.
        held: frequencies to try.
        module: that attends, whose normalisations may stand behind the rotation.

    Returns:
        None where there is no such rotation among those that are known.
    """
    allowed, head_dim = AGREES[early.dtype], early.shape[-1]
    early, late = early.double().cpu(), late.double().cpu()
    best: LayerRotation | None = None
    for candidate in _candidates(held, module, head_dim):
        frame = candidate.frame
        turned = turn_planes(frame.keys(early), candidate.theta * (positions[1] - positions[0]))
        error = float((frame.model_keys(turned) - late).norm() / late.norm().clamp(min=1e-30))
        if error <= allowed and (best is None or error < 0.5 * best.error):
            best = LayerRotation(**{**vars(candidate), "error": error})
            if error <= 0.1 * allowed:
                break
    return best


def turn_planes(states: Tensor, angles: Tensor) -> Tensor:
    """States (…, head_dim) of a `HeadFrame`, every plane turned by its angle (…, head_dim / 2)."""
    first, second = states.chunk(2, dim=-1)
    cos, sin = angles.to(states).cos(), angles.to(states).sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _candidates(held: list[Frequencies], module: nn.Module, head_dim: int) -> Iterator[LayerRotation]:
    """Everything a layer may do, the plainest first."""
    half = head_dim // 2
    still, plain = torch.zeros(half, dtype=torch.float64), torch.ones(half, dtype=torch.float64)
    yield LayerRotation(still, plain, HeadFrame(), 0, False, "", "", 0.0)
    for weight in (None, *_weights(module, head_dim)):
        for frequencies in held:
            planes = frequencies.theta.numel()
            if planes > half:
                continue
            theta = torch.cat([frequencies.theta.double().cpu(), still[planes:]])
            scaling = plain.clone()
            scaling[:planes] = frequencies.scaling
            rotating = 2 * int((frequencies.theta != 0).sum())
            for interleaved in (False, True):
                for last in (False, True) if 2 * planes < head_dim else (False,):
                    order = plane_order(head_dim, 2 * planes, interleaved=interleaved, last=last)
                    for sign in (1, -1):
                        yield LayerRotation(
                            sign * theta,
                            scaling,
                            HeadFrame(order, weight),
                            rotating,
                            interleaved,
                            frequencies.source,
                            frequencies.rope_type,
                            0.0,
                        )


def _weights(module: nn.Module, head_dim: int) -> Iterator[Tensor]:
    """What a normalisation in `module` may multiply every head with."""
    for child in module.children():
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.shape == (head_dim,):
            yield weight.detach().double().cpu()
            yield 1 + weight.detach().double().cpu()


def _scaling_and_type(owner: nn.Module, prefix: str) -> tuple[float, str]:
    scaling = getattr(owner, f"{prefix}attention_scaling", getattr(owner, "attention_scaling", 1.0))
    kind = getattr(owner, "rope_type", "default")
    if isinstance(kind, dict):
        kind = kind.get(prefix.removesuffix("_"), "default")
    return float(scaling), str(kind)
