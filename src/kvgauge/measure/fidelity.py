"""How far compressed attention is from the exact one, on held-out contexts.

Seven relative Frobenius errors per layer, as in the KQ-SVD paper (arXiv 2512.05916, section 5): of K, Q, V, of the
attention matrix K Qᵀ, of V W_O, of the softmax and of the attention output. The softmax is the model's own: its factor
on the scores, its soft cap, its sink logits. Then what the model makes of it: the KL divergence of its next-token
distributions from the uncompressed model's, and the perplexity of the tokens that follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.architecture.facts import model_facts, output_weight
from kvgauge.architecture.rotary import Rotary
from kvgauge.architecture.scaling import Scaling
from kvgauge.attend.mask import causal_mask
from kvgauge.calibration.collecting import second_moment
from kvgauge.contract.budget import reference_nbytes
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.method import Method
from kvgauge.errors import UserError
from kvgauge.evaluation.decoding import prefill
from kvgauge.layers.cache import KVCache
from kvgauge.layers.observing import Observation, observing_cache

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
    cache = observing_cache(model, seen.append)
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
    keys, queries = rotary.unrotate(seen.keys, positions), rotary.unrotate(seen.queries, positions, queries=True)
    return replace(seen, queries=queries, keys=keys, positions=positions)


def rotated(approximation: Approximation, seen: Observation, rotary: Rotary) -> Approximation:
    """Pre-RoPE approximations at the positions of `seen`, post-RoPE."""
    assert seen.positions is not None
    keys = rotary.rotate(approximation.keys, seen.positions)
    queries = rotary.rotate(approximation.queries, seen.positions, queries=True)
    return Approximation(keys, approximation.values, queries)


def layer_errors(seen: Observation, approximations: Sequence[Approximation], weight: Tensor) -> list[dict[str, float]]:
    """The seven relative Frobenius errors of one layer, for each of several approximations of it.

    Norms of products come from second moments, ``‖X Yᵀ‖² = tr(XᵀX · YᵀY)``, in float64; the softmax and the output go
    query block by query block in float32.

    Args:
        seen: exact states, post-RoPE.
        approximations: what methods make of them. Scores are ``q · k̂`` with the exact queries, which is what
            ``(q B)(K A)ᵀ`` is; the approximate queries count for "Q" alone.
        weight: W_O as (num_attention_heads, head_dim, hidden_size).

    Returns:
        `QUANTITIES` → ‖approximate − exact‖ / ‖exact‖ over all heads and tokens. KQ covers the whole matrix, as the
        theorem does; softmax and output are causal.
    """
    groups = seen.queries.shape[1] // seen.keys.shape[1]
    keys, queries, values = seen.keys.double(), seen.queries.double(), seen.values.double()
    query_moment = second_moment(queries, keys.shape[1])
    output_moment = (weight.double() @ weight.double().mT).unflatten(0, (-1, groups)).sum(dim=1)
    errors = []
    for guess in approximations:
        key_error, value_error = guess.keys.double() - keys, guess.values.double() - values
        errors.append(
            {
                "K": _ratio(key_error.square().sum(), keys.square().sum()),
                "Q": _ratio((guess.queries.double() - queries).square().sum(), queries.square().sum()),
                "V": _ratio(value_error.square().sum(), values.square().sum()),
                "KQ": _ratio(_product_norm(key_error, query_moment), _product_norm(keys, query_moment)),
                "VO": _ratio(_product_norm(value_error, output_moment), _product_norm(values, output_moment)),
            }
        )
    for row, attention in zip(errors, _attention_errors(seen, approximations, weight), strict=True):
        row |= attention
    return errors


def _attention_errors(
    seen: Observation, approximations: Sequence[Approximation], weight: Tensor
) -> list[dict[str, float]]:
    """Errors of the causal softmax and of the attention output."""
    tokens = seen.keys.shape[2]
    W = weight.float()
    sums = torch.zeros(len(approximations), 4, dtype=torch.float64)
    for start in range(0, tokens, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, tokens)
        queries = seen.queries[:, :, start:stop].float() * float(seen.scaling)
        hidden = ~causal_mask(stop - start, stop, queries.device)
        scaling = Scaling.of(seen.scaling)
        shares, output = _block_output(queries, seen.keys[:, :, :stop], seen.values[:, :, :stop], hidden, W, scaling)
        totals = [shares.square().sum(), output.square().sum()]
        for index, guess in enumerate(approximations):
            keys, values = guess.keys[:, :, :stop], guess.values[:, :, :stop]
            shares_hat, output_hat = _block_output(queries, keys, values, hidden, W, scaling)
            wrong = [(shares_hat - shares).square().sum(), (output_hat - output).square().sum()]
            sums[index] += torch.stack([*wrong, *totals]).cpu()
    return [{"softmax": _ratio(row[0], row[2]), "output": _ratio(row[1], row[3])} for row in sums]


def _block_output(
    queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, weight: Tensor, scaling: Scaling
) -> tuple[Tensor, Tensor]:
    """Attention shares and the output in hidden_size of one block of (scaled) queries."""
    groups = queries.shape[1] // keys.shape[1]
    scores = queries @ keys.float().repeat_interleave(groups, dim=1).mT
    shares = scaling.weights(scaling.capped(scores).masked_fill_(hidden, -torch.inf))
    mixed = shares @ values.float().repeat_interleave(groups, dim=1)
    return shares, (mixed @ weight).sum(dim=1)


def _product_norm(states: Tensor, moment: Tensor) -> Tensor:
    """``Σ_heads ‖X Yᵀ‖²`` from X (batch, heads, tokens, d) and ``YᵀY`` (heads, d, d)."""
    return (second_moment(states, states.shape[1]) * moment).sum()


def _ratio(error: Tensor, total: Tensor) -> float:
    # a squared norm from moments can come out a rounding below zero
    return float((error.clamp_min(0) / total).sqrt())


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
    for seen in observe(model, ids):
        rotary = Rotary(model, seen.layer) if rope == "pre" else None
        before = seen if rotary is None else rotated_back(seen, rotary)
        guesses = [projected(fitted, seen.layer, rank_k, rank_v, before) for rank_k, rank_v in ranks]
        if rotary is not None:
            guesses = [rotated(guess, before, rotary) for guess in guesses]
        errors = layer_errors(seen, guesses, output_weight(model, seen.layer))
        for (rank_k, rank_v), row in zip(ranks, errors, strict=True):
            cell = {"layer": seen.layer, "rank_k": rank_k, "rank_v": rank_v}
            yield from ({"quantity": quantity, "error": error} | cell for quantity, error in row.items())


@torch.no_grad()
def cache_errors(model: PreTrainedModel, cache: KVCache, ids: Tensor) -> Iterator[dict[str, object]]:
    """FIDELITY rows of a compressed cache that can say what its keys and values stand for.

    Six errors: what a cache does to the queries is part of its scores, not seen from outside.

    Raises:
        UserError: the cache cannot (merged and evicted entries), or the model caches latents (MLA), which are no keys
            and values of heads; it has KL and perplexity only.
    """
    if model_facts(model).latent is not None:
        raise UserError("latents (MLA) are no keys and values of heads, so that there are no errors of them")
    for seen in observe(model, ids):
        keys, values = cache.dense(seen.layer)
        tokens = seen.keys.shape[2]
        guess = Approximation(keys[:, :, :tokens], values[:, :, :tokens], seen.queries)
        (errors,) = layer_errors(seen, [guess], output_weight(model, seen.layer))
        del errors["Q"]
        yield from ({"layer": seen.layer, "quantity": name, "error": error} for name, error in errors.items())


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
def model_fidelity(
    model: PreTrainedModel, method: Method, cache: KVCache, context: Tensor, continuation: Tensor
) -> ModelFidelity:
    """KL and perplexity of a continuation (1, tokens) after a compressed context; the cache grows by the continuation.

    Args:
        model: that the cache was made for.
        method: that made it: what its bytes are compared with.
        cache: of the context, from `compress_context`.
        context, continuation: token ids.

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
        full_nbytes=reference_nbytes(method, model_facts(model), context.shape[1]),
        nbytes_by_part=parts,
    )
