"""The rotary frequencies of a layer, for caches that turn keys by themselves."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.architecture.facts import model_facts
from kvgauge.architecture.planes import PlaneRotation
from kvgauge.architecture.rotations import layer_rotation
from kvgauge.errors import UserError


def layer_plane_rotations(model: PreTrainedModel) -> list[PlaneRotation]:
    """The rotations of the layers that may be compressed, in their `HeadFrame`; layers that rotate alike share one.

    Raises:
        UserError: as `rotary_frequencies`.
    """
    made: list[PlaneRotation] = []
    for layer in range(model_facts(model).num_layers):
        theta = rotary_frequencies(model, layer)
        same = next((one for one in made if torch.equal(one.frequencies, theta.double())), None)
        made.append(PlaneRotation(theta) if same is None else same)
    return made


def rotary_frequencies(model: PreTrainedModel, layer: int | None = None) -> Tensor:
    """θ of every plane of a head in the layer's `HeadFrame`, (head_dim / 2,), radians per position.

    0 in planes that do not rotate.

    Args:
        model: any decoder.
        layer: counted among the layers that may be compressed; None for all of them, if they do the same.

    Raises:
        UserError: as `kvgauge.architecture.rotary.Rotary`, or the model caches latents, which carry no position.
    """
    if model_facts(model).latent is not None:
        raise UserError(f"{type(model).__name__} caches latents (MLA), whose keys do not rotate: use rope: post")
    return layer_rotation(model, layer).theta.to(model.device, torch.float32)
