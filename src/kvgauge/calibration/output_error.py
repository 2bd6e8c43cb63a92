"""What wrong keys and values do to attention outputs, measured on held-out sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.architecture.facts import model_facts, output_weight
from kvgauge.architecture.modules import decoder
from kvgauge.architecture.scaling import Scaling
from kvgauge.layers.observing import Observation, observing_cache

QUERIES = 128  # per sequence, from its second half: these see a context, and are enough for a mean over a layer


@dataclass(frozen=True)
class HeldOutLayer:
    """What one layer's attention sees of one held-out sequence, and what it adds to the residual stream.

    Attributes:
        seen: queries, keys and values, post-RoPE.
        columns: of the sampled queries.
        weight: W_O as (num_attention_heads, head_dim, hidden_size), float32.
        exact: what the sampled queries' attention adds to the residual stream, (1, queries, hidden_size).
        scale: sum of squares of the residual stream behind the attention, at the sampled columns.
    """

    seen: Observation
    columns: Tensor
    weight: Tensor
    exact: Tensor
    scale: float

    def loss(self, keys: Tensor, values: Tensor) -> float:
        """Squared error of the attention output with other keys and values, relative to the residual stream.

        Args:
            keys, values: (1, num_key_value_heads, tokens, head_dim), post-RoPE.
        """
        wrong = attention_output(self.seen.queries, keys, values, self.columns, self.weight, self.seen.scaling)
        return float((wrong - self.exact).double().square().sum()) / self.scale


def attention_output(
    queries: Tensor, keys: Tensor, values: Tensor, columns: Tensor, weight: Tensor, scaling: float
) -> Tensor:
    """What the causal attention of some columns' queries adds to the residual stream, (1, columns, hidden_size).

    Args:
        queries: (1, num_attention_heads, tokens, head_dim), of all columns.
        keys, values: (1, num_key_value_heads, tokens, head_dim).
        columns: (queries,).
        weight: W_O as (num_attention_heads, head_dim, hidden_size).
        scaling: of the scores; a `Scaling` where there is more to them than a factor.
    """
    groups = queries.shape[1] // keys.shape[1]
    asked = queries[:, :, columns].float().unflatten(1, (keys.shape[1], groups)).flatten(2, 3)
    full = Scaling.of(scaling)
    scores = full.capped(asked @ keys.float().mT * float(scaling))
    hidden = torch.arange(keys.shape[2], device=keys.device) > columns[:, None]
    scores = scores.masked_fill(hidden.repeat(groups, 1), -torch.inf)
    weights = full.weights(scores.unflatten(2, (groups, -1)).flatten(1, 2))
    mixed = (weights.unflatten(1, (-1, groups)).flatten(2, 3) @ values.float()).unflatten(2, (groups, -1)).flatten(1, 2)
    return (mixed @ weight).sum(dim=1)


@torch.no_grad()
def held_out_layers(model: PreTrainedModel, sequences: Tensor) -> Iterator[list[HeldOutLayer]]:
    """For each held-out sequence (sequences, tokens) all layers of the model, first layer first."""
    facts = model_facts(model)
    tokens = sequences.shape[1]
    weights = [output_weight(model, layer).detach().float() for layer in range(facts.num_layers)]
    columns = torch.linspace(tokens // 2, tokens - 1, min(QUERIES, tokens - tokens // 2)).long().to(model.device)
    for ids in sequences.split(1):
        seen: list[Observation] = []
        cache = observing_cache(model, seen.append)
        streams: Sequence[Tensor] = decoder(model)(
            input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, output_hidden_states=True
        ).hidden_states
        layers = []
        for state, weight, stream in zip(seen, weights, (streams[index] for index in facts.compressed), strict=True):
            own = columns.to(state.keys.device)
            exact = attention_output(state.queries, state.keys, state.values, own, weight, state.scaling)
            scale = float((stream.to(own.device)[:, own] + exact).double().square().sum())
            layers.append(HeldOutLayer(state, own, weight, exact, scale))
        yield layers
