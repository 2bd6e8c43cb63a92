"""Which layers of a model are joined."""

from __future__ import annotations

from kvgauge.errors import UserError


def layer_range(method: str, start_layer: int, end_layer: int | None, num_layers: int) -> range:
    """Layers `start_layer` to `end_layer`, both counted from 0 and included; None is the last one.

    Raises:
        UserError: there are no such layers.
    """
    end = num_layers - 1 if end_layer is None else end_layer
    if not 0 <= start_layer <= end < num_layers:
        raise UserError(
            f"layers {start_layer} … {end} of {method} are out of range: the model has layers 0 … {num_layers - 1}"
        )
    return range(start_layer, end + 1)
