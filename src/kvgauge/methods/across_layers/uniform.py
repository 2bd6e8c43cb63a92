"""Which models let several layers share one storage."""

from __future__ import annotations

from transformers import PreTrainedModel

from kvgauge.architecture.facts import attention_modules
from kvgauge.errors import UserError


def check_uniform(method: str, model: PreTrainedModel) -> None:
    """Refuse a model whose layers do not cache the same tokens in the same shape.

    Raises:
        UserError: some layers have a sliding window, or a different number of heads.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        raise UserError(
            f"{method} joins layers that cache the same tokens, and this model has sliding windows: "
            f"use a per-layer method such as kqsvd"
        )
    projections = [getattr(module, "k_proj", None) for module in attention_modules(model)]
    shapes = {projection.weight.shape for projection in projections if projection is not None}
    if len(shapes) > 1:
        raise UserError(
            f"{method} joins layers of one shape, and the layers of this model differ in their key/value heads: "
            f"use a per-layer method such as kqsvd"
        )


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
