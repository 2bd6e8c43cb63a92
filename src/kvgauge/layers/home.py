"""Where layers that share something keep it, if the model puts them on several devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvgauge.layers.cache import LayerCache


def shared_home(layers: Sequence[LayerCache]) -> torch.device:
    """The device of most of the layers, the first of equals.

    All that is compressed of them lives there, once. The others' queries and new tokens come to it, and their outputs
    go back: a few vectors a step, where the shared tensors have a row for every token.

    Args:
        layers: filled ones.
    """
    devices = [layer.device for layer in layers]
    return max(devices, key=devices.count)
