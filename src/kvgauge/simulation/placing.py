"""A model on simulated devices, spread over them as ``device_map="auto"`` spreads it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvgauge.simulation.tensor import SimulatedTensor, simulated


def on_devices(model: PreTrainedModel, devices: Sequence[str]) -> PreTrainedModel:
    """A copy of a CPU model, its layers split over `devices` in equal runs; weights are shared.

    Embeddings are on the first device and what follows the layers on the last. As with accelerate, each module gets its
    inputs where its weights are, but for the cache, which has to know for itself; logits come back to the first device.

    Args:
        model: on the CPU; it does not change.
        devices: e.g. ``["cuda:0", "cuda:1"]``.
    """
    placed = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    layers = placed.get_decoder().layers
    homes = {id(module): devices[-1] for module in placed.modules()}
    for module in (placed.get_input_embeddings(), *_named(placed, "rotary")):
        homes[id(module)] = devices[0]
    for index, layer in enumerate(layers):
        for module in layer.modules():
            homes[id(module)] = devices[index * len(devices) // len(layers)]
    known: dict[int, tuple[Tensor, SimulatedTensor]] = {}  # tied weights stay one
    for module in placed.modules():
        _move(module, homes[id(module)], known)
    if len(devices) > 1:
        for module in placed.modules():
            home = next((parameter.device for parameter in module.parameters()), None)
            if module not in (placed, placed.get_decoder()) and home is not None:
                module.register_forward_pre_hook(_aligned(home), with_kwargs=True)
        placed.register_forward_hook(_returned(torch.device(devices[0])))
    return placed


def _named(model: nn.Module, part: str) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if part in name.rpartition(".")[2]]


def _move(module: nn.Module, device: str, known: dict[int, tuple[Tensor, SimulatedTensor]]) -> None:
    stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
    for store in stores:
        for name, value in list(store.items()):
            if not isinstance(value, Tensor) or isinstance(value, SimulatedTensor):
                continue
            # what lives keeps its id to itself
            _, made = known.setdefault(id(value), (value, simulated(value, device)))
            made._is_param = store is module._parameters
            store[name] = made


def _aligned(home: torch.device) -> Any:
    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        moved = {name: value if name == "past_key_values" else _to(value, home) for name, value in kwargs.items()}
        return _to(args, home), moved

    return before


def _returned(home: torch.device) -> Any:
    def after(module: nn.Module, args: tuple, output: Any) -> None:
        output.logits = _to(output.logits, home)

    return after


class _Transfer(torch.autograd.Function):
    """A copy to another device, whose gradient comes back: torch's own takes both devices for `meta`."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device) -> Tensor:
        ctx.source = tensor.device
        return tensor.to(device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.to(ctx.source), None


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value if value.device == device else _Transfer.apply(value, device)
    if isinstance(value, (tuple, list)):
        return type(value)(_to(part, device) for part in value)
    return {name: _to(part, device) for name, part in value.items()} if isinstance(value, dict) else value
