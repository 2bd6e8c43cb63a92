"""Which models presses see as they are: those whose attention is the one that kvpress computes again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.architecture.facts import attention_modules, model_facts
from kvgauge.architecture.modules import decoder
from kvgauge.architecture.prompt_length import fixed_length
from kvgauge.architecture.rotary import rotate_half
from kvgauge.architecture.rotation import AGREES
from kvgauge.architecture.rotations import layer_rotation
from kvgauge.errors import UserError
from kvgauge.layers.inputs import LayerInputs
from kvgauge.layers.observing import Observation, observing_cache
from kvgauge.methods.pressed.kvpress_library import library

TOKENS = 12  # that queries are made of again
SLACK = 10  # queries made again go through sums of another order


def check_pressable(name: str, model: PreTrainedModel) -> None:
    """Refuse a model whose scores a press would compute otherwise than the model does.

    kvpress makes queries again, turns all dimensions of a head by planes of halves, multiplies scores by 1/√head_dim
    and takes their softmax. It writes into transformers' cache as if every layer were keys and values of the whole
    context. What it makes of the queries is compared with what the model's own code makes of them.

    Args:
        name: of the method, for the message.
        model: any decoder.

    Raises:
        UserError: the model has latents, layers with windows or states, capped scores, sink logits, layers of
            different heads, another rotation, another factor on the scores, or queries that kvpress does not make.
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
    different = _difference(model)
    if different is not None:
        raise UserError(f"{name} does not see {facts.name} as it is: {different}; use kqsvd, xkv or kvslimmer")


def _difference(model: PreTrainedModel) -> str | None:
    """How queries and scores of kvpress differ from the model's own, in words; looked for once per model."""
    key = (model.dtype, fixed_length(model))
    known = vars(model).get("_kvgauge_press_difference")
    if known is None or known[0] != key:
        known = (key, _looked_for(model))
        vars(model)["_kvgauge_press_difference"] = known
    found: str | None = known[1]
    return found


@torch.no_grad()
def _looked_for(model: PreTrainedModel) -> str | None:
    seen: list[Observation] = []
    cache = observing_cache(model, seen.append)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    try:
        inputs = LayerInputs(model, cache)
        decoder(model)(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True)
        inputs.stop()
        for module, state, given in zip(attention_modules(model), seen, inputs.layers, strict=True):
            if given is None:
                return f"it is not told what layer {state.layer} is given"
            made = _queries(module, *given)
            error = float((made - state.queries).norm() / state.queries.norm().clamp(min=1e-30))
            if not error <= SLACK * AGREES[model.dtype]:
                return f"it makes other queries than layer {state.layer} does"
            if abs(float(state.scaling) * state.queries.shape[-1] ** 0.5 - 1.0) > 1e-6:
                return f"scores are multiplied with {float(state.scaling):g}, and it takes 1/√{state.queries.shape[-1]}"
    except Exception as error:  # modules of another form than it knows: each fails in its own way
        reason = " ".join(f"{type(error).__name__} {error}".split())[:120]
        return f"its code does not run on it ({reason})"
    return None


def _queries(module: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries (batch, num_attention_heads, tokens, head_dim) as presses make them."""
    made: Tensor = library().utils.get_prerope_query_states(module, hidden)
    return made * cos.unsqueeze(1) + rotate_half(made) * sin.unsqueeze(1)
