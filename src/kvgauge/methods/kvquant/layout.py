"""How keys and values of all heads become rows of channels, before or after the rotation, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from kvgauge.architecture.planes import PlaneRotation, interleaved, planes_of, to_planes


def value_rows(states: Tensor) -> Tensor:
    """(batch, num_key_value_heads, tokens, head_dim) as (batch, tokens, num_key_value_heads · head_dim)."""
    return states.transpose(1, 2).flatten(2)


def key_rows(keys: Tensor, positions: Tensor, rotation: PlaneRotation | None) -> Tensor:
    """Post-RoPE keys as rows of channels, before the rotation where there is one.

    The planes of a head then stand side by side. The rotation is orthogonal, so gradients turn back as keys do.

    Args:
        keys: (batch, num_key_value_heads, tokens, head_dim).
        positions: (batch or 1, tokens).
        rotation: None leaves the keys as they are cached.
    """
    if rotation is None:
        return value_rows(keys)
    turned = to_planes(keys) * rotation.phases(positions).conj().unsqueeze(1)
    return value_rows(interleaved(turned).to(torch.promote_types(keys.dtype, torch.float32)))


def heads_of(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `value_rows`, a view."""
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)


def rotated_heads(rows: Tensor, heads: int, phases: Tensor) -> Tensor:
    """Rows from `key_rows` (batch, tokens, width), rotated by phases (…, tokens, head_dim / 2) in place.

    Returns:
        (batch, heads, tokens, head_dim), a view; the planes of a head side by side.
    """
    states = rows.unflatten(-1, (heads, -1))
    planes_of(states).mul_(phases.unsqueeze(-2))
    return states.transpose(1, 2)
