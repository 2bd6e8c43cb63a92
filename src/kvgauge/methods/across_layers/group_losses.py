"""What a rank loses, per group of layers, of keys and of values in shared subspaces: for allocating a budget.

Spectra of groups need the cross moments of their layers, which calibration moments do not hold: they are taken from the
held-out sequences, each with subspaces of its own, as a prompt would have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.architecture.facts import attention_device
from kvgauge.architecture.head_frame import HeadFrame
from kvgauge.architecture.rotations import layer_rotation
from kvgauge.calibration.allocation import interpolated, ladder
from kvgauge.calibration.output_error import HeldOutLayer, held_out_layers
from kvgauge.methods.across_layers.group import CrossLayerGroup
from kvgauge.methods.across_layers.subspace import SharedSubspace

NewGroups = Callable[[], Sequence[CrossLayerGroup]]  # empty groups whose subspaces will have full rank


@torch.no_grad()
def energy_losses(
    new_groups: NewGroups, groups: Sequence[range], model: PreTrainedModel, sequences: Tensor, metrics: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Losses of keys and of values from the spectra of held-out sequences; see `kvgauge.calibration.allocation`.

    Keys: the mean squared error of the scores of calibration queries, summed over the layers of a group. Values: the
    squared error behind W_O relative to the exact values' there, summed likewise.

    Args:
        new_groups: makes empty groups of full rank.
        groups: their layers.
        model: the one that they belong to.
        sequences: token ids (sequences, tokens).
        metrics: of the stored keys and of values, each (layers, num_key_value_heads, head_dim, head_dim).

    Returns:
        (groups, largest rank + 1) each, at every rank; 0 beyond the largest rank of a smaller group.
    """
    totals: list[list[Tensor]] = [[], []]
    for layers in held_out_layers(model, sequences):
        empty = zip(new_groups(), groups, strict=True)
        rows = [_energies(_fill(group, layers, members, model), members, metrics) for group, members in empty]
        for total, curves in zip(totals, zip(*rows, strict=True), strict=True):
            total.append(_stacked(curves))
    return torch.stack(totals[0]).mean(dim=0), torch.stack(totals[1]).mean(dim=0)


def _energies(group: CrossLayerGroup, members: range, metrics: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    key_parts = _direction_energies(group.keys, metrics[0][members.start : members.stop])
    value_parts = _direction_energies(group.values, metrics[1][members.start : members.stop])
    heads = metrics[0].shape[1]
    keys = key_parts.sum(dim=0) / (len(group.keys) * heads)
    values = (value_parts / value_parts.sum(dim=1, keepdim=True)).sum(dim=0)
    return _discarded(keys), _discarded(values)


def _direction_energies(space: SharedSubspace, metrics: Tensor) -> Tensor:
    """``‖z_i‖² f_iᵀ M f_i`` of every direction of a subspace, per layer: (layers, rank), float64.

    The columns z_i of the basis are orthogonal: in any metric of the features the error of a truncation is the sum of
    these over the directions that it leaves out.
    """
    sizes = space.basis.dense()[0].double().square().sum(dim=0)
    parts = []
    for factor, metric in zip(space.factors, metrics, strict=True):
        heads = factor.dense()[0].double().unflatten(0, metric.shape[:2])
        parts.append(sizes * torch.einsum("ndr,nde,ner->r", heads, metric.to(heads), heads))
    return torch.stack(parts).cpu()


def _discarded(energies: Tensor) -> Tensor:
    """What ranks 0 … n leave out of n energies: (n + 1,)."""
    return torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])


@torch.no_grad()
def greedy_losses(
    new_groups: NewGroups, groups: Sequence[range], model: PreTrainedModel, sequences: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses of keys and of values as measured: see `HeldOutLayer.loss`; arguments and result as `energy_losses`.

    At each rank of a ladder the keys of a group are replaced while its values stay exact, and the other way round.
    """
    totals: list[list[Tensor]] = [[], []]
    for layers in held_out_layers(model, sequences):
        curves: list[list[Tensor]] = [[], []]
        for group, members in zip(new_groups(), groups, strict=True):
            filled, own = _fill(group, layers, members, model), [layers[index] for index in members]
            keys, values = _measured(filled, own, _frames(group, members, model))
            curves[0].append(keys)
            curves[1].append(values)
        for total, part in zip(totals, curves, strict=True):
            total.append(_stacked(part))
    return torch.stack(totals[0]).mean(dim=0), torch.stack(totals[1]).mean(dim=0)


def _measured(
    group: CrossLayerGroup, layers: Sequence[HeldOutLayer], frames: Sequence[HeadFrame]
) -> tuple[Tensor, Tensor]:
    keys, values = group.keys, group.values
    limit = keys.basis.dense().shape[-1]
    ranks = ladder(limit)[:-1]
    losses = torch.zeros(2, len(ranks), dtype=torch.float64)
    for column, rank in enumerate(ranks):
        group.keys, group.values = keys.truncated(rank), values.truncated(rank)
        for member, layer, frame in zip(group.members, layers, frames, strict=True):
            guess_keys, guess_values = (states.to(layer.seen.keys.device) for states in member.context_dense())
            losses[0, column] += layer.loss(frame.model_keys(guess_keys), layer.seen.values)
            losses[1, column] += layer.loss(layer.seen.keys, guess_values)
    key_curve, value_curve = (interpolated([*ranks, limit], [*row.tolist(), 0.0]) for row in losses)
    return key_curve, value_curve


def _fill(
    group: CrossLayerGroup, layers: Sequence[HeldOutLayer], members: range, model: PreTrainedModel
) -> CrossLayerGroup:
    """The group with the subspaces of its layers, on the device of the first."""
    home = layers[members[0]].seen.keys.device
    for member, index, frame in zip(group.members, members, _frames(group, members, model), strict=True):
        seen = layers[index].seen
        member.store(frame.keys(seen.keys).to(home), seen.values.to(home))
    return group


def _frames(group: CrossLayerGroup, members: range, model: PreTrainedModel) -> list[HeadFrame]:
    """In what frame each layer of a group takes its keys: that of its rotation, where it undoes one."""
    return [
        HeadFrame() if rotation is None else layer_rotation(model, index).frame.to(attention_device(model, index))
        for rotation, index in zip(group.rotations, members, strict=True)
    ]


def _stacked(curves: Sequence[Tensor]) -> Tensor:
    """Curves of several lengths as rows of one tensor, 0 behind the end of the shorter ones."""
    return torch.nn.utils.rnn.pad_sequence(list(curves), batch_first=True)
