"""SqueezeLLM (arXiv 2306.07629): weights as packed codes of sensitivity-weighted levels, outliers beside them.

This moves the bytes of the weights, not of the cache. Every output channel of a linear layer has a codebook of its own,
the k-means of its weights, weighted by the diagonal of the Fisher information: the squared gradients of the next-token
loss, summed over a few calibration sequences. The largest and the most sensitive weights stay as they are, in 16 bits.
A layer decodes its whole matrix into a temporary to multiply by it: this saves memory, not time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvgauge.errors import UserError, unknown
from kvgauge.store.bit_packing import pack, unpack
from kvgauge.store.sparse import index_dtype
from kvgauge.store.weighted_kmeans import weighted_kmeans

ROW_BLOCK = 256  # rows that k-means works on at once
SEQUENCE_LENGTH = 512
PARTS = ("codes", "levels", "row_ends", "columns", "kept")


@dataclass(frozen=True, kw_only=True)
class SqueezeLLM:
    """What is behind ``model.weights``.

    Attributes:
        method: ``squeezellm``.
        bits: of a code: 3 or 4, or 8.
        sparse: share of a matrix that stays as it is, in [0, 1]; the paper's is 0.0045.
        sensitive: part of `sparse` that goes to the weights of the largest Fisher information, the rest to those of
            the largest size; the paper's is 0.0005.
        fit_tokens: calibration tokens (essays) that gradients are taken on.

    Raises:
        UserError: values out of range.
    """

    method: str = "squeezellm"
    bits: int = 4
    sparse: float = 0.0045
    sensitive: float = 0.0005
    fit_tokens: int = 2048

    def __post_init__(self) -> None:
        if self.method != "squeezellm":
            raise unknown("method of model.weights", str(self.method), ["squeezellm"])
        if self.bits not in (3, 4, 8):
            raise UserError(f"bits {self.bits} of model.weights: give 3, 4 or 8")
        if not 0.0 <= self.sensitive <= self.sparse <= 1.0:
            raise UserError(
                f"sparse {self.sparse:g} and sensitive {self.sensitive:g} of model.weights: "
                f"0 ≤ sensitive ≤ sparse ≤ 1, the paper's are 0.0045 and 0.0005"
            )
        if self.fit_tokens < SEQUENCE_LENGTH:
            raise UserError(f"fit_tokens {self.fit_tokens} of model.weights is below one sequence of {SEQUENCE_LENGTH}")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> SqueezeLLM:
        """From a mapping.

        Raises:
            UserError: an unknown field, or a value out of range.
        """
        known = tuple(cls.__dataclass_fields__)
        for name in options:
            if name not in known:
                raise unknown("field of model.weights", str(name), known)
        return cls(**options)


class SqueezedLinear(nn.Module):
    """A linear layer whose weights are codes, levels of every row, and kept entries in compressed sparse rows.

    Args:
        parts: tensors by the names of `PARTS`: codes (out, packed bytes), levels (out, 2 ** bits), row_ends (out,)
            the number of kept entries up to each row, columns and kept (entries,).
        in_features: columns of the matrix.
        dtype: of the matrix when it is decoded.
        bias: of the layer.
    """

    codes: Tensor
    levels: Tensor
    row_ends: Tensor
    columns: Tensor
    kept: Tensor

    def __init__(self, parts: Mapping[str, Tensor], in_features: int, dtype: torch.dtype, bias: Tensor | None) -> None:
        super().__init__()
        for name in PARTS:
            self.register_buffer(name, parts[name])
        self.in_features, self.out_features, self.weight_dtype = in_features, parts["codes"].shape[0], dtype
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The decoded matrix (out, in), made anew at every access."""
        bits = self.levels.shape[1].bit_length() - 1
        codes = unpack(self.codes, bits, self.in_features).long()
        weight = self.levels.to(self.weight_dtype).gather(1, codes)
        counts = torch.nn.functional.pad(self.row_ends, (1, 0)).diff().long()
        rows = torch.arange(self.out_features, device=codes.device).repeat_interleave(counts)
        weight[rows, self.columns.long()] = self.kept.to(self.weight_dtype)
        return weight

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states, self.weight, self.bias)


def squeezed_parts(weight: Tensor, fisher: Tensor, options: SqueezeLLM) -> dict[str, Tensor]:
    """The tensors of a `SqueezedLinear` for a matrix and its Fisher diagonal, both (out, in)."""
    chosen = kept_entries(weight, fisher, options)
    mass = fisher.masked_fill(chosen, 0.0).float()
    wide = weight.float()
    stored = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float16
    codes, levels = [], []
    for rows, weights in zip(wide.split(ROW_BLOCK), mass.split(ROW_BLOCK), strict=True):
        found = weighted_kmeans(rows, weights, 2**options.bits, atoms=max(48, 2**options.bits)).to(stored)
        between = (found[:, 1:].float() + found[:, :-1].float()) / 2
        codes.append(pack(torch.searchsorted(between.contiguous(), rows.contiguous()).to(torch.uint8), options.bits))
        levels.append(found)
    return {
        "codes": torch.cat(codes),
        "levels": torch.cat(levels),
        "row_ends": chosen.sum(dim=1).cumsum(0).to(torch.int32),
        "columns": chosen.nonzero()[:, 1].to(index_dtype(weight.shape[1])),
        "kept": weight[chosen].to(stored),
    }


def kept_entries(weight: Tensor, fisher: Tensor, options: SqueezeLLM) -> Tensor:
    """Which entries (out, in) stay as they are: the largest, and of the others the most sensitive."""
    total = round(options.sparse * weight.numel())
    sensitive = min(round(options.sensitive * weight.numel()), total)
    chosen = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    chosen[weight.abs().flatten().topk(total - sensitive).indices] = True
    rest = fisher.flatten().float().masked_fill(chosen, -1.0)
    chosen[rest.topk(sensitive).indices] = True
    return chosen.view_as(weight)


def linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers inside the decoder's layers, by name; embeddings and the output layer stay as they are."""
    inside = {id(module) for layer in model.get_decoder().layers for module in layer.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module) in inside:
            yield name, module


def weight_fisher(model: PreTrainedModel, sequences: Tensor) -> dict[str, Tensor]:
    """Squared gradients of the next-token loss in every linear layer, summed over sequences (count, tokens).

    Raises:
        UserError: they are not finite.
    """
    layers = dict(linears(model))
    fisher = {name: torch.zeros_like(layer.weight, dtype=torch.float32) for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        for ids in sequences:
            tokens = ids[None].to(model.device)
            with torch.enable_grad():
                model(tokens, labels=tokens, use_cache=False).loss.backward()
            for name, layer in layers.items():
                assert layer.weight.grad is not None
                fisher[name].addcmul_(layer.weight.grad.float(), layer.weight.grad.float())
                layer.weight.grad = None
    finally:
        for layer in layers.values():
            layer.weight.requires_grad_(False)
            layer.weight.grad = None
    if not all(bool(torch.isfinite(part).all()) for part in fisher.values()):
        raise UserError("gradients of the weights are not finite: load the model in float32 or bfloat16")
    return fisher


def squeeze(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Replace the linear layers of `model` by squeezed ones, from tensors named ``<layer>/<part>``."""
    for name, layer in list(linears(model)):
        parts = {part: tensors[f"{name}/{part}"].to(layer.weight.device) for part in PARTS}
        parent, _, child = name.rpartition(".")
        squeezed = SqueezedLinear(parts, layer.in_features, layer.weight.dtype, layer.bias)
        setattr(model.get_submodule(parent), child, squeezed)


def packed_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that hold squeezed weights, by name."""
    for name, module in model.named_modules():
        if isinstance(module, SqueezedLinear):
            yield from ((f"{name}.{part}", getattr(module, part)) for part in PARTS)
