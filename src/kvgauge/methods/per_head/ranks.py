"""From a budget, a tolerance or explicit numbers to the ranks of every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from kvgauge.calibration.allocation import spend
from kvgauge.errors import UserError

Ranks = list[tuple[int, int]]  # (rank_k, rank_v) per layer


def explicit_ranks(name: str, rank_k: int, rank_v: int, num_layers: int, head_dim: int) -> Ranks:
    """The same ranks everywhere.

    Raises:
        UserError: a rank outside 1 … head_dim.
    """
    for label, rank in (("rank_k", rank_k), ("rank_v", rank_v)):
        if not 1 <= rank <= head_dim:
            raise UserError(f"{label} {rank} of {name} is outside 1 … {head_dim}, the model's head_dim")
    return [(rank_k, rank_v)] * num_layers


def budget_ranks(name: str, numbers: float, num_layers: int, head_dim: int) -> Ranks:
    """Ranks that store at most `numbers` numbers per token and kv-head in the mean over layers, as many as possible.

    Keys and values get the same rank up to one, and some layers one more than others: the granularity is one rank of
    one layer.

    Args:
        name: of the method, for the error message.
        numbers: rank_k + rank_v that the budget pays for, e.g. ``budget · 2 · head_dim``.
        num_layers, head_dim: of the model.

    Raises:
        UserError: the budget does not pay for rank 1.
    """
    total = _total(name, numbers, num_layers, head_dim)
    return [(share // 2, share - share // 2) for share in _spread(total, num_layers)]


def allocated_ranks(name: str, losses_k: Tensor, losses_v: Tensor, numbers: float) -> Ranks:
    """Ranks of the least summed loss that store as many numbers as `budget_ranks`.

    Args:
        name: of the method, for the error message.
        losses_k, losses_v: (layers, head_dim + 1), at ranks 0 … head_dim, comparable with each other.
        numbers: as for `budget_ranks`.

    Raises:
        UserError: the budget does not pay for rank 1.
    """
    num_layers, head_dim = losses_k.shape[0], losses_k.shape[1] - 1
    total = _total(name, numbers, num_layers, head_dim)
    ranks = spend([*losses_k, *losses_v], [1.0] * (2 * num_layers), total)
    return list(zip(ranks[:num_layers], ranks[num_layers:], strict=True))


def _total(name: str, numbers: float, num_layers: int, head_dim: int) -> int:
    """Ranks of all layers, keys and values together, that `numbers` per layer pay for."""
    total = min(int(numbers * num_layers + 1e-9), 2 * head_dim * num_layers)
    if total < 2 * num_layers:
        least = 1.0 / head_dim
        raise UserError(f"the budget of {name} does not pay for rank 1: raise it to {least:g} or above")
    return total


def latent_ranks(name: str, budget: float, num_layers: int, kv_lora_rank: int, rotary: int) -> Ranks:
    """Ranks of MLA's latents that keep the cached bytes within `budget`; the rotary keys stay and count.

    Args:
        name: of the method, for the error message.
        budget: share of the ``kv_lora_rank + rotary`` numbers per token and layer.
        num_layers: of the model.
        kv_lora_rank: dimension of a latent.
        rotary: dimension of a rotary key.

    Raises:
        UserError: the budget does not pay for rank 1 beside the rotary keys.
    """
    width = kv_lora_rank + rotary
    total = min(int((budget * width - rotary) * num_layers + 1e-9), kv_lora_rank * num_layers)
    if total < num_layers:
        raise UserError(
            f"budget {budget:g} of {name} does not pay for rank 1 beside the rotary keys: "
            f"raise it to {(rotary + 1) / width:.3g} or above"
        )
    return [(rank, rank) for rank in _spread(total, num_layers)]


def _spread(total: int, num_layers: int) -> list[int]:
    """`total` over the layers, evenly up to one."""
    base, extra = divmod(total, num_layers)
    return [base + ((layer + 1) * extra // num_layers - layer * extra // num_layers) for layer in range(num_layers)]


def epsilon_ranks(energies_k: Tensor, energies_v: Tensor, epsilon: float) -> Ranks:
    """Per layer the smallest ranks whose discarded energy is at most ε² of the total, averaged over the layer's heads.

    Args:
        energies_k, energies_v: (layers, num_key_value_heads, head_dim), descending; normalised per head here.
        epsilon: ε in (0, 1); the KQ-SVD paper uses 0.1.

    Raises:
        UserError: ε outside (0, 1).
    """
    if not 0.0 < epsilon < 1.0:
        raise UserError(f"epsilon {epsilon:g} is outside (0, 1): the paper uses 0.1")
    return list(zip(_smallest(energies_k, epsilon), _smallest(energies_v, epsilon), strict=True))


def _smallest(energies: Tensor, epsilon: float) -> list[int]:
    shares = (energies / energies.sum(-1, keepdim=True)).mean(dim=1)
    # what rank r leaves out, r = 1 … d
    discarded = shares.flip(-1).cumsum(-1).flip(-1)
    left_out = torch.cat([discarded[:, 1:], torch.zeros_like(discarded[:, :1])], dim=-1)
    enough = left_out <= epsilon**2 + 1e-15
    return [int(row.int().argmax()) + 1 for row in enough]
