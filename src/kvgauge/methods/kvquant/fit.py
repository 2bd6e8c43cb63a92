"""What KVQuant learns offline: thresholds of the channels of keys, and the levels of keys and values.

A few calibration sequences are run forwards and backwards. Levels are the weighted k-means of the normalised samples of
a layer, weighted by the diagonal of the Fisher information (arXiv 2401.18079, section 3.2): the squared gradient of the
next-token loss in every cached number. Levels live on the grid, where the gradient of a number is ``scale`` times its
own, so that the squared error that they minimise is the one in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.architecture.facts import model_facts
from kvgauge.architecture.planes import PlaneRotation
from kvgauge.architecture.rotations import layer_rotation
from kvgauge.errors import UserError
from kvgauge.layers.observing import Observation, observing_cache
from kvgauge.methods.kvquant.grid import ChannelGrid, Grid, TokenGrid
from kvgauge.methods.kvquant.layout import key_rows, value_rows
from kvgauge.store.weighted_kmeans import weighted_kmeans


@dataclass
class Samples:
    """What one layer cached in the calibration sequences.

    Attributes:
        keys, values: rows (tokens, width) of every sequence, float32 on the CPU, as they are coded.
        key_fisher, value_fisher: squared gradients, shaped alike.
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    key_fisher: list[Tensor] = field(default_factory=list)
    value_fisher: list[Tensor] = field(default_factory=list)


def calibration_samples(
    model: PreTrainedModel, sequences: Sequence[Tensor], rotations: Sequence[PlaneRotation | None], sinks: int
) -> list[Samples]:
    """Keys and values of every layer with their Fisher diagonals.

    Memory is 16 bytes per cached number of the sequences: a hundred megabytes per 1,000 tokens of an 8B model.

    Args:
        model: its weights get no gradient.
        sequences: token ids (tokens,).
        rotations: of every layer, undone for the keys and their gradients; None leaves them as they are cached.
        sinks: first tokens of every sequence that are left out, as they stay exact.

    Raises:
        UserError: no sequence has two tokens behind the sinks, or gradients are not finite.
    """
    layers = [Samples() for _ in range(model_facts(model).num_layers)]
    seen: list[Observation] = []

    def observe(observation: Observation) -> None:
        observation.keys.retain_grad()
        observation.values.retain_grad()
        seen.append(observation)

    frames = [None if rotation is None else layer_rotation(model, at).frame for at, rotation in enumerate(rotations)]
    for ids in sequences:
        if ids.numel() < sinks + 2:
            continue
        tokens = ids.to(model.device, torch.long)[None]
        with torch.enable_grad():
            embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
            cache = observing_cache(model, observe)
            loss = model(inputs_embeds=embedded, labels=tokens, past_key_values=cache, use_cache=True).loss
            loss.backward()
        positions = torch.arange(tokens.shape[1], device=model.device)[None]
        for observation in seen:
            layer = layers[observation.layer]
            rotation, frame = rotations[observation.layer], frames[observation.layer]
            states = _with_gradient(observation.keys)
            if frame is not None:  # a gradient in keys goes the way of queries
                placed = frame.to(observation.keys.device)
                states = (placed.keys(states[0]), placed.queries(states[1]))
            own = positions.to(observation.keys.device)
            keys, key_slope = (key_rows(part, own, rotation) for part in states)
            values, value_slope = (value_rows(part) for part in _with_gradient(observation.values))
            layer.keys.append(keys[0, sinks:].cpu())
            layer.values.append(values[0, sinks:].cpu())
            layer.key_fisher.append(key_slope[0, sinks:].square().cpu())
            layer.value_fisher.append(value_slope[0, sinks:].square().cpu())
        seen.clear()
    if not layers[0].keys:
        raise UserError(f"calibration sequences are too short: they need at least {sinks + 2} tokens")
    if not all(bool(torch.isfinite(fisher).all()) for layer in layers for fisher in layer.key_fisher):
        raise UserError("gradients of the calibration sequences are not finite: load the model in float32 or bfloat16")
    return layers


def _with_gradient(states: Tensor) -> tuple[Tensor, Tensor]:
    assert states.grad is not None
    return states.detach().float(), states.grad.float()


def thresholds(rows: Tensor, outliers: float) -> tuple[Tensor, Tensor]:
    """Per channel the bounds that leave `outliers` of the samples (tokens, width) outside, half on each side."""
    ordered = rows.sort(dim=0).values
    cut = int(rows.shape[0] * outliers / 2)
    return ordered[cut], ordered[rows.shape[0] - 1 - cut]


def levels(grid: Grid, rows: Tensor, fisher: Tensor, bits: Sequence[int]) -> Iterator[Tensor]:
    """Non-uniform levels on `grid` of one layer's samples, (2 ** bits,) each.

    Args:
        grid: what the samples are measured by.
        rows, fisher: (tokens, width), samples and their squared gradients.
        bits: of every codebook wanted.
    """
    measured = grid.measure(rows)
    scale = measured.scales[..., :1].float() if measured.scales is not None else _scale(grid)
    inside = torch.ones_like(rows, dtype=torch.bool) if measured.outliers is None else ~measured.outliers
    samples = measured.normalised[inside].clamp(-1, 1)[None]
    weights = (fisher * scale.square())[inside][None]
    for width in bits:
        yield weighted_kmeans(samples, weights, 2**width)[0]


def _scale(grid: Grid) -> Tensor:
    assert isinstance(grid, ChannelGrid)
    return grid.scale


def fit_layers(samples: Sequence[Samples], outliers: float, bits: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of a fit: ``key_low`` and ``key_high`` (layers, width), ``key_levels_b`` and ``value_levels_b``
    (layers, 2 ** b) for every b of `bits`."""
    found: dict[str, list[Tensor]] = {}
    for layer in samples:
        keys, values = torch.cat(layer.keys), torch.cat(layer.values)
        low, high = thresholds(keys, outliers)
        found.setdefault("key_low", []).append(low)
        found.setdefault("key_high", []).append(high)
        grids: dict[str, tuple[Grid, Tensor, Tensor]] = {
            "key": (ChannelGrid(low, high, sparse=outliers > 0), keys, torch.cat(layer.key_fisher)),
            "value": (TokenGrid(outliers, values.shape[1]), values, torch.cat(layer.value_fisher)),
        }
        for name, (grid, rows, fisher) in grids.items():
            for width, codebook in zip(bits, levels(grid, rows, fisher, bits), strict=True):
                found.setdefault(f"{name}_levels_{width}", []).append(codebook)
    return {name: torch.stack(tensors) for name, tensors in found.items()}
