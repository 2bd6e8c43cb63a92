"""Which models presses see as they are: those whose attention is the one that kvpress computes again."""

from __future__ import annotations

from transformers import PreTrainedModel

from kvgauge.architecture.facts import model_facts
from kvgauge.architecture.rotations import layer_rotation
from kvgauge.errors import UserError


def check_pressable(name: str, model: PreTrainedModel) -> None:
    """Refuse a model whose scores a press would compute otherwise than the model does.

    kvpress makes queries again, turns all dimensions of a head by planes of halves, and takes a softmax of scores. It
    writes into transformers' cache as if every layer were keys and values of the whole context.

    Args:
        name: of the method, for the message.
        model: any decoder.

    Raises:
        UserError: the model has latents, layers with windows or states, capped scores, sink logits, layers of
            different heads, or another rotation.
    """
    facts = model_facts(model)
    facts.check(name, uneven=False, per_head="prunes")
    features = sorted({feature for layer in facts.layers for feature in layer.features})
    if features:
        raise UserError(f"{name} knows nothing of what {facts.name} has: {', '.join(features)}; use kqsvd or full")
    for layer in range(facts.num_layers):
        rotation = layer_rotation(model, layer)
        if rotation.rotary_dim != facts.head_dim or not rotation.frame.identity:
            raise UserError(
                f"{name} turns whole heads by planes of halves, and {facts.name} turns its keys otherwise "
                f"(layer {layer}): use kqsvd, xkv or kvslimmer"
            )
