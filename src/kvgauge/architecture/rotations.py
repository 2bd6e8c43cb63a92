"""The rotations of a model's layers, found once and remembered as long as its positions mean the same."""

from __future__ import annotations

from transformers import PreTrainedModel

from kvgauge.architecture.facts import model_facts
from kvgauge.architecture.glimpse import Glimpse, glimpse
from kvgauge.architecture.layer import LayerFacts
from kvgauge.architecture.modules import cached_attention, decoder
from kvgauge.architecture.prompt_length import fixed_length, length_dependent
from kvgauge.architecture.rotation import AGREES, LayerRotation, find_rotation, held_frequencies
from kvgauge.errors import UserError

POSITIONS = (5, 42)
"""Where the same tokens are looked at: 37 positions apart, no multiple of a plane's period."""


def layer_rotation(model: PreTrainedModel, layer: int | None = None) -> LayerRotation:
    """What the keys of a layer go through.

    With multi-head latent attention the rotary key that all heads share does; the latents carry no position.

    Args:
        model: any decoder.
        layer: counted among the layers that may be compressed; None for all of them, if they do the same.

    Raises:
        UserError: it is not known, it depends on the length of a prompt that is not fixed, or the layers differ.
    """
    kind = length_dependent(model)
    if kind is not None and fixed_length(model) is None:
        raise UserError(
            f"rope type {kind!r} changes with the sequence length: "
            f"fix it for a prompt, or choose a method with `rope: post`"
        )
    found = layer_rotations(model)
    if not found:
        model_facts(model).check("a method that turns keys")
    for index, rotation in enumerate(found):
        if (layer is None or layer == index) and not isinstance(rotation, LayerRotation):
            raise UserError(rotation)
    known = [rotation for rotation in found if isinstance(rotation, LayerRotation)]
    if layer is not None:
        chosen = found[layer]
        assert isinstance(chosen, LayerRotation)
        return chosen
    others = [rotation for rotation in known if not rotation.same_as(known[0])]
    if others:
        raise UserError(
            f"the layers of {type(model).__name__} rotate differently ({described(known[0])}; {described(others[0])}): "
            f"choose a method that takes each layer's own, or `rope: post`"
        )
    return known[0]


def layer_rotations(model: PreTrainedModel) -> list[LayerRotation | str]:
    """Of every layer that may be compressed: its rotation, or why it is not known."""
    facts = model_facts(model)
    key = (model.dtype, fixed_length(model))
    known = getattr(model, "_kvgauge_rotations", None)
    if known is None or known[0] != key:
        seen = glimpse(model, POSITIONS)
        known = (key, [rotation_of(model, facts.layers[index], seen) for index in facts.compressed])
        model._kvgauge_rotations = known
    found: list[LayerRotation | str] = known[1]
    return found


def rotation_of(model: PreTrainedModel, layer: LayerFacts, seen: Glimpse) -> LayerRotation | str:
    """The rotation of one layer of any kind that caches keys, or why it is not known.

    Args:
        model: the layer's.
        layer: which of its layers.
        seen: what the model cached at `POSITIONS`.
    """
    name, index = type(model).__name__, layer.index
    turned, still = (seen.keys, seen.values) if layer.latent is None else (seen.values, seen.keys)
    if index not in turned:
        return f"layer {index} of {name} caches nothing that could be looked at: choose a method with `rope: post`"
    broken = [letter for letter, states in (("k", seen.keys), ("v", seen.values)) if not states[index].isfinite().all()]
    if broken:
        return f"activations of layer {index} ({broken[0]}) are not finite: load the model in float32 or bfloat16"
    if not seen.positioned:
        return f"{name} takes no positions (ALiBi or the like): choose a method with `rope: post`"
    change = float((still[index][0] - still[index][1]).norm() / still[index][0].norm().clamp(min=1e-30))
    if change > AGREES[turned[index].dtype]:
        return f"{name} adds positions to its hidden states and rotates nothing: choose a method with `rope: post`"
    types = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    module = cached_attention(model)[index]
    held = held_frequencies(decoder(model), types[index] if types else None, module)
    found = find_rotation(turned[index][0], turned[index][1], POSITIONS, held, module)
    if found is None:
        return f"how layer {index} of {name} turns its keys is not known: choose a method with `rope: post`"
    return found


def described(rotation: LayerRotation) -> str:
    """A rotation in a few words."""
    if not rotation.rotary_dim:
        return "no rotation"
    dims = 2 * len(rotation.theta)
    part = "" if rotation.rotary_dim == dims else f"{rotation.rotary_dim} of {dims} dimensions, "
    pairs = "neighbours" if rotation.interleaved else "halves"
    after = ", norm after it" if rotation.normed_after else ""
    return f"{part}{pairs}, {rotation.rope_type} at {rotation.source.rpartition('.')[2]}{after}"
