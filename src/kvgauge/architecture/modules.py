"""Where attention stands in a model: the decoder, the modules that cache keys and values, and their projections.

Modules are told by what they have, not by what their class or their place is called: an attention module knows the
index of its cache layer and has a projection that makes keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kvgauge.errors import UserError

KEY_PROJECTION = re.compile(r"(^|_)(k|kv|qkv|key|query_key_value)(_|$)|Wqkv|c_attn")
OUTPUT_PROJECTION = re.compile(r"^(o|c|out|output)_proj$|^(dense|wo|proj)$", re.IGNORECASE)


def decoder(model: PreTrainedModel) -> nn.Module:
    """The text decoder of `model`, which may stand inside a model of several modalities."""
    found: nn.Module = model.get_decoder()
    return found if any(True for _ in _attentions(found)) else model


def cached_attention(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The attention modules by the index of the cache layer that they fill.

    Raises:
        UserError: two modules fill one layer.
    """
    found: dict[int, nn.Module] = {}
    for index, module in _attentions(decoder(model)):
        if found.setdefault(index, module) is not module:
            raise UserError(f"two attention modules of {type(model).__name__} share cache layer {index}: not supported")
    return dict(sorted(found.items()))


def projection(module: nn.Module, pattern: re.Pattern[str]) -> nn.Module | None:
    """The first child of `module` that multiplies with weights, in whatever form, and whose name fits `pattern`."""
    for name, child in module.named_children():
        held = (*child.parameters(), *child.buffers())
        if pattern.search(name) and "norm" not in name and held:
            return child
    return None


def out_features(module: nn.Module) -> int | None:
    """How many numbers a projection makes; None where it does not say."""
    said = getattr(module, "out_features", None)
    weight = weight_of(module)
    return said if isinstance(said, int) else None if weight is None else weight.shape[0]


def weight_of(module: nn.Module) -> Tensor | None:
    """The weight of a projection as (out_features, in_features); None where it has no matrix."""
    inner = module if isinstance(getattr(module, "weight", None), Tensor) else getattr(module, "linear", module)
    weight = getattr(inner, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    return weight.T if isinstance(inner, Conv1D) else weight


def _attentions(root: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    for module in root.modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or index < 0 or _recurrent(module):
            continue
        if projection(module, KEY_PROJECTION) is not None:
            yield index, module


def _recurrent(module: nn.Module) -> bool:
    """Keeps a state that a convolution feeds, and no keys (Mamba, gated delta rule, Lightning attention …)."""
    return hasattr(module, "A_log") or any(isinstance(child, nn.Conv1d) for child in module.children())
