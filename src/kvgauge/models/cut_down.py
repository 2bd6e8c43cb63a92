"""A few layers of a model as a model of their own: what holds there holds for all layers like them."""

from __future__ import annotations

import copy

from torch import nn
from transformers import PreTrainedModel

from kvgauge.architecture.facts import ModelFacts, model_facts
from kvgauge.architecture.layer import LayerFacts
from kvgauge.architecture.modules import decoder
from kvgauge.architecture.rotations import described, layer_rotations

FEWEST = 2  # layers: one hands on what the other reads


def cut_down(model: PreTrainedModel, most_parameters: int) -> PreTrainedModel | None:
    """The first layers of `model`, as many as show every kind of layer it has, in float32.

    Args:
        model: any decoder; it is not changed.
        most_parameters: of the copy.

    Returns:
        None where no such copy can be made: layers share caches, or stand elsewhere, or would be too many.
    """
    facts, stack = model_facts(model), _stack(model)
    if stack is None or any(layer.readers for layer in facts.layers):
        return None
    parent, name, layers = stack
    count = _layers_needed(model, facts)
    kept = nn.ModuleList(list(layers)[:count])
    left_out = sum(parameter.numel() for layer in list(layers)[count:] for parameter in layer.parameters())
    if sum(parameter.numel() for parameter in model.parameters()) - left_out > most_parameters:
        return None
    parent._modules[name] = kept
    try:
        small = copy.deepcopy(model)
    finally:
        parent._modules[name] = layers
    for module in small.modules():
        for known in [key for key in vars(module) if key.startswith("_kvgauge")]:
            delattr(module, known)
    config = small.config.get_text_config(decoder=True)
    config.num_hidden_layers = count
    for listed in ("layer_types", "kv_sharing_modes"):
        value = getattr(config, listed, None)
        if isinstance(value, list) and len(value) > count:
            setattr(config, listed, value[:count])
    return small.float().eval()


def _layers_needed(model: PreTrainedModel, facts: ModelFacts) -> int:
    """How many layers from the first on show all kinds."""
    rotations = dict(zip(facts.compressed, layer_rotations(model), strict=True))

    def kind(layer: LayerFacts) -> tuple[object, ...]:
        rotation = rotations.get(layer.index)
        turned = described(rotation) if rotation is not None and not isinstance(rotation, str) else rotation
        return layer.kind, layer.window, layer.shape, layer.softcap, layer.sink_logits, layer.state_nbytes, turned

    seen: set[tuple[object, ...]] = set()
    needed = FEWEST
    for layer in facts.layers:
        if kind(layer) not in seen:
            seen.add(kind(layer))
            needed = max(needed, layer.index + 1)
    return min(needed, len(facts.layers))


def _stack(model: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """The list of decoder layers: its owner, its name, and itself."""
    wanted = model.config.get_text_config(decoder=True).num_hidden_layers
    if wanted != len(model_facts(model).layers):
        return None
    for parent in decoder(model).modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == wanted:
                return parent, name, child
    return None
