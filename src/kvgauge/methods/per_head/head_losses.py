"""What a rank loses, per layer, of keys and of values that are low rank per head: for allocating a budget."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.architecture.facts import model_facts
from kvgauge.calibration.allocation import held_out, interpolated, ladder
from kvgauge.calibration.moments import Moments
from kvgauge.calibration.output_error import HeldOutLayer, held_out_layers
from kvgauge.calibration.whitening import output_moments
from kvgauge.methods.per_head.factorization import Pair


def product_losses(pair: Pair, left: Tensor, right: Tensor) -> Tensor:
    """``‖X (1 − A_r B_rᵀ) Yᵀ‖²`` at every rank, from ``left = XᵀX`` and ``right = YᵀY``; not only of optimal pairs.

    ``tr(C D) − 2 Σ_{i≤r} a_iᵀ C D b_i + Σ_{i,j≤r} (Aᵀ C A)_{ij} (Bᵀ D B)_{ij}`` with C = `left` and D = `right`.

    Args:
        pair: A, B (…, d, r), best direction first.
        left, right: (…, d, d) float64.

    Returns:
        (…, r + 1), rank 0 first.
    """
    single = torch.einsum("...di,...de,...ei->...i", pair.A, left @ right, pair.B)
    double = (pair.A.mT @ left @ pair.A) * (pair.B.mT @ right @ pair.B)
    kept = double.cumsum(-1).cumsum(-2).diagonal(dim1=-2, dim2=-1) - 2 * single.cumsum(-1)
    whole = (left * right).sum((-2, -1)).unsqueeze(-1)
    return torch.cat([whole, (whole + kept).clamp_min(0)], dim=-1)


def energy_losses(keys: Pair, values: Pair, moments: Moments, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Losses of keys and of values in closed form, (layers, head_dim + 1) each; see `kvgauge.calibration.allocation`.

    Keys: the mean squared error of the scores ``s q·k`` over all tokens, queries and heads. Values: the squared error
    of ``V W_O``, relative to ``V W_O``, over the heads of a layer.
    """
    C_K, C_Q = moments.keys("post"), moments.queries("post")
    facts = model_facts(model)
    pairs = moments.tokens**2 * facts.num_attention_heads  # of a key and a query
    factors = moments.scalings().to(C_K).square()[:, None]
    scores = product_losses(keys, C_K, C_Q).sum(dim=1) * factors / pairs
    outputs = product_losses(values, moments.values(), output_moments(model)).sum(dim=1)
    return scores, outputs / outputs[:, :1]


def greedy_losses(
    name: str, keys: Pair, values: Pair, moments: Moments, model: PreTrainedModel, sinks: int
) -> tuple[Tensor, Tensor]:
    """Losses of keys and of values as measured, (layers, head_dim + 1) each: see `HeldOutLayer.loss`.

    At each rank of a ladder the keys of a layer are replaced while its values stay exact, and the other way round; the
    mean is over the held-out sequences.

    Args:
        name: of the method, for the error message.
        keys, values: pairs of all layers, post-RoPE.
        moments: hold the held-out sequences.
        model: the one that they belong to.
        sinks: first tokens that stay exact.

    Raises:
        UserError: there are no held-out sequences.
    """
    sequences = held_out(name, moments)
    limit, num_layers = keys.A.shape[-1], keys.A.shape[0]
    ranks = ladder(limit)[:-1]
    totals = torch.zeros(2, num_layers, len(ranks), dtype=torch.float64)
    for layers in held_out_layers(model, sequences):
        for index, layer in enumerate(layers):
            for column, rank in enumerate(ranks):
                totals[:, index, column] += torch.tensor(_losses(layer, index, keys, values, rank, sinks))
    means = totals / len(sequences)
    curves = [[interpolated([*ranks, limit], [*row.tolist(), 0.0]) for row in part] for part in means]
    return torch.stack(curves[0]), torch.stack(curves[1])


def _losses(layer: HeldOutLayer, index: int, keys: Pair, values: Pair, rank: int, sinks: int) -> tuple[float, float]:
    """The losses of one layer with keys of a rank, and with values of a rank."""
    exact_keys, exact_values = layer.seen.keys, layer.seen.values
    guesses = []
    for exact, pair in ((exact_keys, keys), (exact_values, values)):
        A, B = (side[index, :, :, :rank].to(exact.device, torch.float32) for side in (pair.A, pair.B))
        guess = (exact.float() @ A) @ B.mT
        guess[:, :, :sinks] = exact[:, :, :sinks].float()
        guesses.append(guess)
    return layer.loss(guesses[0], exact_values), layer.loss(exact_keys, guesses[1])
