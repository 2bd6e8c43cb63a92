"""Why keys merge better than values: the asymmetry that AsymKV and KVSlimmer build on.

Two observations of the papers (arXiv 2506.05410, arXiv 2603.00907). The spectral energy of the query and key
projections is concentrated in few directions, that of the value projection is dispersed. And the keys of adjacent
tokens are alike, their values are not. Tokens far apart are measured beside adjacent ones: what they have in common,
such as a large mean, says nothing about neighbours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from kvgauge.architecture.facts import attention_modules, model_facts
from kvgauge.architecture.rotary import Rotary
from kvgauge.errors import UserError
from kvgauge.layers.observing import Observation, observing_cache

PROJECTIONS = {"W_Q": "q_proj", "W_K": "k_proj", "W_V": "v_proj"}
FAR = 64  # tokens: the distance that adjacent ones are compared with


@dataclass(frozen=True)
class Spectrum:
    """Singular values of the heads of one projection, per head of shape (head_dim, hidden_size).

    Attributes:
        energy: (head_dim,), shares σ² / Σ σ², largest first, means over heads.
    """

    energy: Tensor

    @classmethod
    def of(cls, weight: Tensor, head_dim: int) -> Spectrum:
        """Of a projection's weight (heads · head_dim, hidden_size)."""
        heads = weight.detach().double().unflatten(0, (-1, head_dim))
        energy = torch.linalg.svdvals(heads).square()
        return cls((energy / energy.sum(-1, keepdim=True)).mean(dim=0))

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the energies, over head_dim: 1 where all directions carry the same energy.

        Roy & Vetterli, "The effective rank" (EUSIPCO 2007).
        """
        positive = self.energy[self.energy > 0]
        return float((-(positive * positive.log()).sum()).exp()) / len(self.energy)

    def top_share(self, part: float = 0.25) -> float:
        """The energy in the first `part` of the directions."""
        return float(self.energy[: max(1, round(part * len(self.energy)))].sum())


def weight_rows(model: PreTrainedModel) -> list[dict[str, Any]]:
    """One row per layer and projection: effective rank, energy of the first quarter of directions, and all energies.

    Raises:
        UserError: a model without one projection each for queries, keys and values.
    """
    facts = model_facts(model)
    rows = []
    for layer, module in enumerate(attention_modules(model)):
        for quantity, name in PROJECTIONS.items():
            projection = getattr(module, name, None)
            if projection is None:
                raise UserError(f"{type(model).__name__} has no {name}: its heads cannot be compared")
            spectrum = Spectrum.of(projection.weight, facts.head_dim)
            rows.append(
                {
                    "quantity": quantity,
                    "layer": layer,
                    "effective_rank": spectrum.effective_rank,
                    "top_quarter": spectrum.top_share(),
                    "energy": spectrum.energy.tolist(),
                }
            )
    return rows


def cosine_rows(
    model: PreTrainedModel, token_batches: Iterable[Tensor], distances: tuple[int, ...] = (1, FAR)
) -> list[dict[str, Any]]:
    """One row per layer, quantity and distance: the cosine similarity of two tokens of one head, mean and deviation.

    Quantities: ``K`` before the rotary embedding, where the methods merge; ``K rotated`` after it; ``V``.

    Args:
        model: loaded by `kvgauge.load_model`.
        token_batches: each (batch, tokens), without padding.
        distances: between the two tokens.

    Raises:
        UserError: sequences shorter than the largest distance, or a model without a rotary embedding.
    """
    rotaries = [Rotary(model, layer) for layer in range(model_facts(model).num_layers)]
    sums: dict[tuple[int, str, int], Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))

    def observe(seen: Observation) -> None:
        positions = seen.positions
        if positions is None:
            positions = torch.arange(seen.keys.shape[2], device=seen.keys.device)[None]
        states = {"K": rotaries[seen.layer].unrotate(seen.keys, positions), "K rotated": seen.keys, "V": seen.values}
        for quantity, state in states.items():
            for distance in distances:
                cosine = functional.cosine_similarity(state[:, :, :-distance], state[:, :, distance:], dim=-1).double()
                moments = torch.stack([torch.ones_like(cosine).sum(), cosine.sum(), cosine.square().sum()])
                sums[seen.layer, quantity, distance] += moments.cpu()

    with torch.no_grad():
        for batch in token_batches:
            if batch.shape[1] <= max(distances):
                raise UserError(f"sequences of {batch.shape[1]} tokens are too short: use more than {max(distances)}")
            cache = observing_cache(model, observe)
            model(input_ids=batch.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    rows = []
    for (layer, quantity, distance), (count, total, squares) in sums.items():
        mean = float(total / count)
        deviation = max(0.0, float(squares / count) - mean**2) ** 0.5
        row = {"quantity": quantity, "layer": layer, "distance": distance, "cosine": mean, "deviation": deviation}
        rows.append(row)
    return rows
