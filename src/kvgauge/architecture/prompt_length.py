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


def fix_length(model: PreTrainedModel, tokens: int) -> None:
    """Use the frequencies of a prompt of `tokens` tokens from here on, whatever was read before.

    A model whose frequencies do not depend on the length is left alone.

    Args:
        model: any decoder.
        tokens: of the prompt.
    """
    root = decoder(model)
    if not _adapting(root) or _fixed(root) == tokens:
        return
    _read(root, tokens)
    for module, kinds in _adapting(root):
        if isinstance(module.rope_type, dict):
            fixed = {name: FIXED if kind in LENGTH_DEPENDENT else kind for name, kind in kinds.items()}
            vars(module)["rope_type"] = fixed
        else:
            vars(module)["rope_type"] = FIXED
    vars(root)["_kvgauge_fixed_length"] = tokens


def length_changes(model: PreTrainedModel, tokens: int, longest: int) -> str | None:
    """The rope type of `model`, if what follows a prompt is turned by other frequencies than the prompt was.

    Args:
        model: any decoder.
        tokens: of the prompt.
        longest: with all that follows it.
    """
    root, before = decoder(model), fixed_length(model)
    if not _adapting(root):
        return None
    tables = []
    for length in (tokens, longest):
        _read(root, length)
        tables.append([buffer.clone() for buffer in _frequencies(root)])
    _release(root)
    if before is not None:
        fix_length(model, before)
    same = all(torch.equal(first, second) for first, second in zip(*tables, strict=True))
    return None if same else length_dependent(model)


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


@torch.no_grad()
def _read(root: nn.Module, tokens: int) -> None:
    """The state that a prompt of `tokens` tokens leaves in modules that have read nothing before."""
    _release(root)
    for module, kinds in _adapting(root):
        like = next(module.buffers())
        position = torch.tensor([[tokens - 1]], device=like.device)
        for layer_type in kinds:
            module(like, position, *([layer_type] if layer_type else []))


def _frequencies(root: nn.Module) -> list[torch.Tensor]:
    return [
        getattr(module, f"{name}_inv_freq" if name else "inv_freq")
        for module, kinds in _adapting(root)
        for name in kinds
    ]


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
