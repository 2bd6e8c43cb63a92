"""Why layers can share a subspace: tokens differ from layer to layer, the directions that dominate them do not.

The observation behind xKV (arXiv 2503.18893): the cosine of a token's keys in two layers is low, yet the dominant left
singular vectors of the layers' key matrices align. Left singular vectors live in token space, so layers can be compared
whatever the coordinates of their features.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from kvgauge.architecture.facts import check_length, model_facts
from kvgauge.architecture.rotary import Rotary
from kvgauge.errors import UserError
from kvgauge.methods.exact.full import Full


def alignment(layers: Tensor, rank: int) -> dict[str, Tensor]:
    """How alike the layers are, as (layers, layers) matrices, 1 on the diagonal.

    Args:
        layers: (layers, tokens, features), one sequence.
        rank: dominant left singular vectors that are compared.

    Returns:
        ``cosine``: mean over tokens of the cosine of the same token in both layers.
        ``cka``: linear centred kernel alignment, ``‖X̄ᵀȲ‖² / (‖X̄ᵀX̄‖ ‖ȲᵀȲ‖)``.
        ``subspace``: mean squared cosine of the principal angles between the dominant left singular subspaces,
        ``‖UᵀV‖² / rank``; unrelated subspaces have rank / tokens.

    Raises:
        UserError: a rank outside 1 … min(tokens, features).
    """
    _, tokens, features = layers.shape
    if not 1 <= rank <= min(tokens, features):
        raise UserError(
            f"rank {rank} of the alignment is outside 1 … {min(tokens, features)}, the smaller of tokens and features"
        )
    rows = layers.double()
    units = torch.nn.functional.normalize(rows, dim=-1)
    cosine = torch.einsum("atf,btf->ab", units, units) / tokens
    centred = rows - rows.mean(dim=1, keepdim=True)
    products = _cross_energies(centred)
    norms = products.diagonal().sqrt()
    return {
        "cosine": cosine,
        "cka": products / (norms[:, None] * norms[None, :]),
        "subspace": _cross_energies(dominant_tokens(rows, rank)) / rank,
    }


def dominant_tokens(rows: Tensor, rank: int) -> Tensor:
    """Dominant left singular vectors (layers, tokens, rank) of each (tokens, features) matrix."""
    values, vectors = torch.linalg.eigh(rows.transpose(1, 2) @ rows)
    scale = values[:, -rank:].clamp_min(torch.finfo(values.dtype).tiny).rsqrt()
    return rows @ (vectors[:, :, -rank:] * scale[:, None])


def _cross_energies(rows: Tensor) -> Tensor:
    """``‖X_aᵀ X_b‖²`` of all pairs of layers, (layers, layers)."""
    count = rows.shape[0]
    energies = rows.new_empty(count, count)
    for layer in range(count):
        energies[layer] = (rows[layer].T @ rows).square().sum(dim=(1, 2))
    return energies


@torch.no_grad()
def layer_alignment(
    model: PreTrainedModel, token_batches: Iterable[Tensor], rank: int, *, progress: bool = False
) -> dict[str, Tensor]:
    """`alignment` of pre-RoPE keys and of values (of latents, for MLA models), the mean over sequences.

    Args:
        model: loaded by `kvgauge.load_model`.
        token_batches: integer tensors (batch, tokens), without padding.
        rank: dominant left singular vectors that are compared.
        progress: show a bar on stderr.

    Returns:
        ``keys_cosine``, ``keys_cka``, ``keys_subspace`` and the same of ``values``; of ``latents`` for MLA models.

    Raises:
        UserError: no tokens, a sequence longer than the model's positions, or a rank out of range.
    """
    facts = model_facts(model)
    rotaries = None if facts.latent is not None else [Rotary(model, layer) for layer in range(facts.num_layers)]
    sums: dict[str, Tensor] = {}
    sequences = 0
    for batch in tqdm(token_batches, desc="alignment", unit="batch", disable=not progress):
        check_length(model, batch.shape[1], "a sequence")
        cache = Full().new_cache(model)
        model.get_decoder()(input_ids=batch.to(model.device), past_key_values=cache, use_cache=True)
        positions = torch.arange(batch.shape[1], device=model.device)[None]
        pairs = [cache.dense(layer) for layer in range(facts.num_layers)]
        if rotaries is None:
            states = {"latents": torch.stack([latents for latents, _ in pairs])}
        else:
            states = {
                "keys": torch.stack(
                    [rotary.unrotate(keys, positions) for rotary, (keys, _) in zip(rotaries, pairs, strict=True)]
                ),
                "values": torch.stack([values for _, values in pairs]),
            }
        for name, stacked in states.items():
            for sequence in stacked.transpose(2, 3).flatten(3).unbind(dim=1):  # (layers, tokens, heads · head_dim)
                for measure, matrix in alignment(sequence, rank).items():
                    key = f"{name}_{measure}"
                    sums[key] = sums[key] + matrix if key in sums else matrix
        sequences += batch.shape[0]
    if not sequences:
        raise UserError("no tokens to compare layers on: give a corpus with at least one sequence")
    return {name: (total / sequences).cpu() for name, total in sums.items()}
