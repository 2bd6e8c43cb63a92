"""Rotary embeddings whose frequencies depend on the length of a prompt (dynamic NTK, LongRoPE).

transformers' modules adapt their frequencies in every forward pass, and some keep them until a prompt is short again.
An answer then depends on the prompts before it, and on how a prompt is cut into passes. Here the frequencies of one
length are set and stay, whatever passes follow: those that transformers would use for a whole prompt of that length.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvgauge.architecture.modules import decoder

LENGTH_DEPENDENT = ("dynamic", "longrope")
FIXED = "fixed"  # a rope type that transformers' modules do not adapt


def length_dependent(model: PreTrainedModel) -> str | None:
    """The rope type of `model` whose frequencies depend on the length of a prompt; None where there is none."""
    adapting = _adapting(decoder(model))
    return next((kind for _, kinds in adapting for kind in kinds.values() if kind in LENGTH_DEPENDENT), None)


def fixed_length(model: PreTrainedModel) -> int | None:
    """The length that `fix_length` was called with; None where frequencies adapt, or have no need to."""
    return _fixed(decoder(model))


@torch.no_grad()
def fix_length(model: PreTrainedModel, tokens: int) -> None:
    """Use the frequencies of a prompt of `tokens` tokens from here on, whatever was read before.

    A model whose frequencies do not depend on the length is left alone.

    Args:
        model: any decoder.
        tokens: of the prompt with all that will be generated after it.
    """
    root = decoder(model)
    if not _adapting(root) or _fixed(root) == tokens:
        return
    _release(root)
    for module, kinds in _adapting(root):
        like, position = torch.empty(0, device=model.device), torch.tensor([[tokens - 1]], device=model.device)
        if isinstance(module.rope_type, dict):
            for layer_type in kinds:
                module(like, position, layer_type)
            fixed = {name: FIXED if kind in LENGTH_DEPENDENT else kind for name, kind in kinds.items()}
            vars(module)["rope_type"] = fixed
        else:
            module(like, position_ids=position)
            vars(module)["rope_type"] = FIXED
    vars(root)["_kvgauge_fixed_length"] = tokens


def release_length(model: PreTrainedModel) -> None:
    """Undo `fix_length`, and forget all that earlier prompts left in the rotary modules."""
    _release(decoder(model))


@contextmanager
def prompt_length(model: PreTrainedModel, tokens: int) -> Iterator[None]:
    """`fix_length` for the time of a ``with`` block."""
    before = fixed_length(model)
    fix_length(model, tokens)
    try:
        yield
    finally:
        release_length(model)
        if before is not None:
            fix_length(model, before)


def install(model: PreTrainedModel) -> None:
    """Let every prompt find the rotary modules as if it were the first: a pass into an empty cache forgets the others.

    Models whose frequencies do not depend on the length are left alone, and so is a length that was fixed.
    """
    if length_dependent(model) is not None:
        decoder(model).register_forward_pre_hook(_forget, with_kwargs=True)


def _forget(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("past_key_values")
    if _fixed(root) is None and (cache is None or not cache.get_seq_length()):
        _release(root)


@torch.no_grad()
def _release(root: nn.Module) -> None:
    for module, kinds in _adapting(root):
        vars(module)["rope_type"] = kinds if isinstance(module.rope_type, dict) else kinds[""]
        for prefix in (f"{name}_" if name else "" for name in kinds):
            original = getattr(module, f"{prefix}original_inv_freq", None)
            if original is not None:
                buffer = getattr(module, f"{prefix}inv_freq")
                setattr(module, f"{prefix}inv_freq", original.clone().to(buffer.device))
            if hasattr(module, f"{prefix}max_seq_len_cached"):
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
        if hasattr(module, "max_seq_len_cached"):
            module.max_seq_len_cached = module.original_max_seq_len
    vars(root)["_kvgauge_fixed_length"] = None


def _fixed(root: nn.Module) -> int | None:
    length: int | None = vars(root).get("_kvgauge_fixed_length")
    return length


def _adapting(root: nn.Module) -> list[tuple[nn.Module, dict[str, str]]]:
    """Rotary modules that adapt, with their rope types by layer type ("" where there is one type for all)."""
    known: list[tuple[nn.Module, dict[str, str]]] | None = vars(root).get("_kvgauge_adapting")
    if known is not None:
        return known
    found = []
    for module in root.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = {"": kinds} if isinstance(kinds, str) else kinds
        if isinstance(kinds, dict) and any(kind in LENGTH_DEPENDENT for kind in kinds.values()):
            found.append((module, dict(kinds)))
    vars(root)["_kvgauge_adapting"] = found
    return found
