"""How far compressed attention is from the exact one, on held-out contexts.

Seven relative Frobenius errors per layer, as in the KQ-SVD paper (arXiv 2512.05916, section 5): of K, Q, V, of the
attention matrix K Qᵀ, of V W_O, of the softmax and of the attention output. The scores are scaled by 1/√head_dim, as
the model does. Then what the model makes of it: the KL divergence of its next-token distributions from the uncompressed
model's, and the perplexity of the tokens that follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.caches.attention import causal_mask
from kvgauge.caches.base import KVCache
from kvgauge.caches.observing import Observation, observing_cache
from kvgauge.errors import UserError
from kvgauge.evaluation.decoding import prefill
from kvgauge.methods.base import Method
from kvgauge.methods.fitted import Fitted
from kvgauge.models.facts import model_facts, output_weight
from kvgauge.models.rotary import Rotary

QUANTITIES = ("K", "Q", "V", "KQ", "VO", "softmax", "output")

QUERY_BLOCK = 256  # queries whose score matrices are in memory at once


@dataclass(frozen=True)
class Approximation:
    """What a method makes of one layer's states; shapes as in `Observation`.

    Attributes:
        keys, values: as the compressed cache stands for them.
        queries: as the method asks with them; the exact ones where it leaves queries alone.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor


@torch.no_grad()
def observe(model: PreTrainedModel, ids: Tensor) -> list[Observation]:
    """What every layer's attention sees of one context (1, tokens)."""
    seen: list[Observation] = []
    cache = observing_cache(model_facts(model).num_layers, seen.append)
    model.get_decoder()(input_ids=ids, past_key_values=cache, use_cache=True)
    return seen


def projected(fitted: Fitted, layer: int, rank_k: int, rank_v: int, seen: Observation) -> Approximation:
    """What per-head pairs make of exact states: ``K A Bᵀ``, ``Q B Aᵀ`` and ``V A_v B_vᵀ``."""
    pairs = fitted.truncated(layer, rank_k, rank_v)
    A, B, A_v, B_v = (tensor.to(seen.keys.device, torch.float64) for tensor in pairs)
    groups = seen.queries.shape[1] // seen.keys.shape[1]
    query_map = (B @ A.mT).repeat_interleave(groups, dim=0)
    return Approximation(
        keys=seen.keys.double() @ (A @ B.mT),
        values=seen.values.double() @ (A_v @ B_v.mT),
        queries=seen.queries.double() @ query_map,
    )


def rotated_back(seen: Observation, rotary: Rotary) -> Observation:
    """The same states before the rotary embedding."""
    positions = seen.positions
    if positions is None:
        positions = torch.arange(seen.keys.shape[2], device=seen.keys.device)[None]
    keys, queries = rotary.unrotate(seen.keys, positions), rotary.unrotate(seen.queries, positions)
    return Observation(seen.layer, queries, keys, seen.values, positions)


def rotated(approximation: Approximation, seen: Observation, rotary: Rotary) -> Approximation:
    """Pre-RoPE approximations at the positions of `seen`, post-RoPE."""
    assert seen.positions is not None
    keys = rotary.rotate(approximation.keys, seen.positions)
    queries = rotary.rotate(approximation.queries, seen.positions)
    return Approximation(keys, approximation.values, queries)


def layer_errors(
    seen: Observation, approximation: Approximation, weight: Tensor, *, factored: bool
) -> dict[str, float]:
    """The seven relative Frobenius errors of one layer.

    Args:
        seen: exact states, post-RoPE.
        approximation: what the method makes of them.
        weight: W_O as (num_attention_heads, head_dim, hidden_size).
        factored: the approximate scores are ``q · k̂``, as in ``Q B (K A)ᵀ``; the approximate queries count for "Q" alone.

    Returns:
        `QUANTITIES` → ‖approximate − exact‖ / ‖exact‖ over all heads and tokens. KQ covers the whole matrix, as the
        theorem does; softmax and output are causal.
    """
    groups = seen.queries.shape[1] // seen.keys.shape[1]
    W = weight.double()
    exact = {"K": seen.keys.double(), "Q": seen.queries.double(), "V": seen.values.double()}
    approximate = {
        "K": approximation.keys.double(),
        "Q": approximation.queries.double(),
        "V": approximation.values.double(),
    }
    errors = {name: _relative(approximate[name], exact[name]) for name in ("K", "Q", "V")}
    per_query = {
        name: (exact[name].repeat_interleave(groups, dim=1), approximate[name].repeat_interleave(groups, dim=1))
        for name in ("K", "V")
    }
    queries = exact["Q"] if factored else approximate["Q"]
    sums = {name: [0.0, 0.0] for name in ("KQ", "softmax", "output")}
    keys, keys_hat = per_query["K"]
    values, values_hat = per_query["V"]
    output, output_hat = values @ W, values_hat @ W
    errors["VO"] = _relative(output_hat, output)
    tokens = keys.shape[2]
    scale = keys.shape[3] ** -0.5
    mask = causal_mask(tokens, tokens, keys.device)
    for start in range(0, tokens, QUERY_BLOCK):
        rows = slice(start, start + QUERY_BLOCK)
        scores = exact["Q"][:, :, rows] @ keys.mT
        scores_hat = queries[:, :, rows] @ keys_hat.mT
        _add(sums["KQ"], scores_hat, scores)
        hidden = ~mask[:, :, rows]
        shares = torch.softmax((scores * scale).masked_fill(hidden, -torch.inf), dim=-1)
        shares_hat = torch.softmax((scores_hat * scale).masked_fill(hidden, -torch.inf), dim=-1)
        _add(sums["softmax"], shares_hat, shares)
        _add(sums["output"], ((shares_hat @ values_hat) @ W).sum(dim=1), ((shares @ values) @ W).sum(dim=1))
    errors |= {name: (error / total) ** 0.5 for name, (error, total) in sums.items()}
    return {name: errors[name] for name in QUANTITIES}


def _relative(approximate: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.norm(approximate - exact) / torch.linalg.norm(exact))


def _add(total: list[float], approximate: Tensor, exact: Tensor) -> None:
    total[0] += float((approximate - exact).square().sum())
    total[1] += float(exact.square().sum())


@torch.no_grad()
def projection_errors(
    model: PreTrainedModel, fitted: Fitted, rope: str, ranks: list[tuple[int, int]], ids: Tensor
) -> Iterator[dict[str, object]]:
    """FIDELITY rows (layer, quantity, error, rank_k, rank_v) of per-head pairs on one context (1, tokens).

    Args:
        model: exact reference.
        fitted: pairs at full rank.
        rope: ``post`` or ``pre``: what the pairs were fitted on.
        ranks: (rank_k, rank_v) pairs to measure, the same for every layer.
        ids: the context.
    """
    rotary = Rotary(model) if rope == "pre" else None
    for seen in observe(model, ids):
        weight = output_weight(model, seen.layer)
        for rank_k, rank_v in ranks:
            if rotary is None:
                approximation = projected(fitted, seen.layer, rank_k, rank_v, seen)
            else:
                before = rotated_back(seen, rotary)
                approximation = rotated(projected(fitted, seen.layer, rank_k, rank_v, before), before, rotary)
            errors = layer_errors(seen, approximation, weight, factored=True)
            for quantity, error in errors.items():
                yield {
                    "layer": seen.layer,
                    "quantity": quantity,
                    "error": error,
                    "rank_k": rank_k,
                    "rank_v": rank_v,
                }


@torch.no_grad()
def cache_errors(model: PreTrainedModel, cache: KVCache, ids: Tensor) -> Iterator[dict[str, object]]:
    """FIDELITY rows of a compressed cache that can say what its keys and values stand for.

    Raises:
        UserError: the cache cannot (merged and evicted entries); it has KL and perplexity only.
    """
    for seen in observe(model, ids):
        keys, values = cache.dense(seen.layer)
        tokens = seen.keys.shape[2]
        approximation = Approximation(keys[:, :, :tokens], values[:, :, :tokens], seen.queries)
        for quantity, error in layer_errors(
            seen, approximation, output_weight(model, seen.layer), factored=True
        ).items():
            yield {"layer": seen.layer, "quantity": quantity, "error": error}


@dataclass(frozen=True)
class ModelFidelity:
    """What the model makes of a compressed context.

    Attributes:
        kl: mean KL divergence (nats a token) of the next-token distribution from the uncompressed model's.
        perplexity, perplexity_full: of the continuation, compressed and uncompressed.
        nbytes, full_nbytes: cached bytes of the context.
        nbytes_by_part: live bytes by what they are for.
    """

    kl: float
    perplexity: float
    perplexity_full: float
    nbytes: int
    full_nbytes: int
    nbytes_by_part: dict[str, int]


@torch.no_grad()
def compress_context(model: PreTrainedModel, method: Method, fitted: Fitted | None, context: Tensor) -> KVCache:
    """The compressed cache of one context (1, tokens)."""
    cache = method.new_cache(model, fitted)
    cache.expect(context.shape[1])
    prefill(model, context, cache)
    cache.compress()
    return cache


@torch.no_grad()
def model_fidelity(model: PreTrainedModel, cache: KVCache, context: Tensor, continuation: Tensor) -> ModelFidelity:
    """KL and perplexity of a continuation (1, tokens) after a compressed context; the cache grows by the continuation.

    Raises:
        UserError: fewer than two tokens of continuation.
    """
    if continuation.shape[1] < 2:
        raise UserError("a continuation of at least 2 tokens is needed to measure KL and perplexity")
    nbytes, parts = cache.nbytes(), cache.nbytes_by_part()
    after = model(input_ids=continuation, past_key_values=cache, use_cache=True).logits[0].double().log_softmax(-1)
    everything = torch.cat([context, continuation], dim=1)
    exact = model(input_ids=everything, logits_to_keep=continuation.shape[1]).logits[0].double().log_softmax(-1)
    targets = continuation[0, 1:, None]
    return ModelFidelity(
        kl=float((exact.exp() * (exact - after)).sum(-1).mean()),
        perplexity=float((-after[:-1].gather(-1, targets)).mean().exp()),
        perplexity_full=float((-exact[:-1].gather(-1, targets)).mean().exp()),
        nbytes=nbytes,
        full_nbytes=model_facts(model).full_nbytes(context.shape[1]),
        nbytes_by_part=parts,
    )
