"""Streaming collection: one plain forward pass per batch, moments added up as the layers go by."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from kvgauge.architecture.facts import check_length, model_facts
from kvgauge.architecture.modules import decoder
from kvgauge.architecture.prompt_length import prompt_length
from kvgauge.architecture.rotary import Rotary
from kvgauge.calibration.moments import NAMES, Moments, first_sequences
from kvgauge.errors import UserError
from kvgauge.layers.observing import Observation, observing_cache
from kvgauge.models.identity import model_fingerprint


@torch.no_grad()
def collect(
    model: PreTrainedModel,
    token_batches: Iterable[Tensor],
    *,
    held_out: Tensor | None = None,
    progress: bool = False,
) -> Moments:
    """Second moments of K, Q and V per layer and kv-head, pre- and post-RoPE, in float64.

    Of a model whose rotation cannot be undone there are none before it.

    Models with multi-head latent attention give the moments of their latents, which are keys and values at once, and of
    the queries with W_UK absorbed.

    Memory does not depend on the number of tokens. Results of several processes or shards add up with ``+``.

    Args:
        model: loaded by `kvgauge.load_model`.
        token_batches: integer tensors (batch, tokens) or (tokens,), without padding.
        held_out: token ids (sequences, tokens) that are none of them, passed on to what `fit` measures.
        progress: show a bar on stderr.

    Raises:
        UserError: no tokens at all, a sequence longer than the model's positions, or activations that are not finite.
    """
    facts = model_facts(model)
    facts.check("calibration", uneven=False)
    shape = (facts.num_layers, facts.num_key_value_heads, facts.head_dim, facts.head_dim)
    sums = {name: torch.zeros(shape, dtype=torch.float64, device=model.device) for name in NAMES}
    rotaries: list[Rotary] | None = None
    tokens = longest = 0
    sequences: tuple[Tensor, ...] = ()

    scalings = [1.0] * facts.num_layers

    def observe(seen: Observation) -> None:
        scalings[seen.layer] = float(seen.scaling)
        positions = seen.positions
        if positions is None:
            positions = torch.arange(seen.keys.shape[2], device=seen.keys.device)[None]
        states = {
            "k_post": seen.keys,
            "q_post": seen.queries,
            "v": seen.values,
        }
        rotary = None if rotaries is None else rotaries[seen.layer]
        if facts.latent is not None:  # latents carry no rotation
            states |= {"k_pre": seen.keys, "q_pre": seen.queries}
        elif rotary is not None:
            states["k_pre"] = rotary.unrotate(seen.keys, positions)
            states["q_pre"] = rotary.unrotate(seen.queries, positions, queries=True)
        for name, rows in states.items():
            sums[name][seen.layer].add_(second_moment(rows, facts.num_key_value_heads).to(sums[name].device))

    for batch in tqdm(token_batches, desc="collect", unit="batch", disable=not progress):
        ids = batch.unsqueeze(0) if batch.ndim == 1 else batch
        check_length(model, ids.shape[1], "a calibration sequence")
        cache = observing_cache(model, observe)
        with prompt_length(model, ids.shape[1]):
            rotaries = _rotaries(model)
            # The decoder alone: logits over the vocabulary are not needed.
            decoder(model)(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True)
        tokens += ids.numel()
        longest = max(longest, ids.shape[1])
        sequences = first_sequences((*sequences, *ids.to("cpu", torch.int32)))
    if not tokens:
        raise UserError("no calibration tokens: give a corpus with at least one sequence")
    if facts.latent is None and rotaries is None:
        sums = {name: value for name, value in sums.items() if not name.endswith("_pre")}
    finite = {name: torch.isfinite(value).flatten(1).all(dim=1).tolist() for name, value in sums.items()}
    for layer in range(facts.num_layers):  # the first layer that is wrong is the cause of those behind it
        if bad := [name for name in sums if not finite[name][layer]]:
            raise UserError(
                f"activations of layer {layer} ({', '.join(bad)}) are not finite: load the model in float32 or bfloat16"
            )
    metadata = {
        "model": model_fingerprint(model),
        "model_name": getattr(model, "name_or_path", "") or type(model).__name__,
        "tokens": tokens,
        "sequence_length": longest,
        "scalings": scalings,
    }
    return Moments({name: value.cpu() for name, value in sums.items()}, metadata, sequences, held_out)


def _rotaries(model: PreTrainedModel) -> list[Rotary] | None:
    """Of every layer; None where keys cannot be turned back: the moments before the rotation are then left out."""
    try:
        return [Rotary(model, layer) for layer in range(model_facts(model).num_layers)]
    except UserError:
        return None


def second_moment(states: Tensor, num_key_value_heads: int) -> Tensor:
    """``Σ xᵀx`` over batch, tokens and the heads of a group.

    Args:
        states: (batch, heads, tokens, head_dim); heads are a multiple of `num_key_value_heads`, group by group.
        num_key_value_heads: N.

    Returns:
        (N, head_dim, head_dim), float64.
    """
    heads, head_dim = states.shape[1], states.shape[3]
    rows = states.unflatten(1, (num_key_value_heads, heads // num_key_value_heads)).movedim(1, 0)
    rows = rows.reshape(num_key_value_heads, -1, head_dim).double()
    return rows.transpose(1, 2) @ rows
