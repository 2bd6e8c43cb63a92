"""Facts of one decoder layer's attention, read from its module and from the configuration of its layer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from kvgauge.architecture.kinds import Keeping, Kind
from kvgauge.architecture.modules import out_features, projection

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads", "n_kv_heads")
HEAD_DIM = ("head_dim", "head_size", "attention_head_size", "kv_channels")
KEYS_ALONE = re.compile(r"^(k|key)_proj$")
VALUES_ALONE = re.compile(r"^(v|value)_proj$")
FUSED = re.compile(r"qkv|query_key_value|c_attn", re.IGNORECASE)


@dataclass(frozen=True)
class LatentFacts:
    """Shapes of multi-head latent attention (MLA).

    Attributes:
        kv_lora_rank: dimension of the latent that all heads share.
        qk_rope_head_dim: dimension of the rotary key that all heads share.
        qk_nope_head_dim, v_head_dim: dimensions per head of what a latent expands to.
    """

    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class LayerFacts:
    """What one layer attends with and what transformers' own cache holds of it.

    Attributes:
        index: of the layer in the cache.
        kind: see `Kind`.
        window: tokens that a query may see, itself included; None without a window or chunks.
        num_attention_heads: query heads H; 0 without attention.
        num_key_value_heads: key/value heads N; 1 for latents.
        head_dim: dimension of a key; of the latent for latents.
        value_head_dim: dimension of a value; of the rotary key for latents.
        latent: shapes of MLA.
        softcap: scores are ``softcap · tanh(scores / softcap)``; None where they are not capped.
        sink_logits: every head has a logit of its own in the normaliser of its softmax.
        state_nbytes: bytes of a sequence's recurrent and convolutional states.
        source: the layer whose cache a `Kind.SHARED` one reads.
        readers: the layers that read this one's cache.
    """

    index: int
    kind: Kind
    window: int | None = None
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    value_head_dim: int = 0
    latent: LatentFacts | None = None
    softcap: float | None = None
    sink_logits: bool = False
    state_nbytes: int = 0
    source: int | None = None
    readers: tuple[int, ...] = ()

    @property
    def compressible(self) -> bool:
        """The cache of the layer grows with the context, and is keys and values or latents."""
        return self.kind in (Kind.FULL, Kind.LATENT)

    @property
    def cached_width(self) -> int:
        """Numbers that the uncompressed cache holds per token."""
        if self.kind in (Kind.LINEAR, Kind.SHARED, Kind.NONE):
            return 0
        return self.num_key_value_heads * (self.head_dim + self.value_head_dim)

    @property
    def num_key_value_groups(self) -> int:
        """Query heads that share a key/value head: g = H / N."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """H, N, and the dimensions of keys and values."""
        return self.num_attention_heads, self.num_key_value_heads, self.head_dim, self.value_head_dim

    @property
    def features(self) -> tuple[str, ...]:
        """What the layer has that plain attention has not, in words."""
        named = {
            "a window": self.kind is Kind.WINDOW,
            "chunks": self.kind is Kind.CHUNK,
            "latents (MLA)": self.latent is not None,
            "an indexer (sparse attention)": self.kind is Kind.SPARSE,
            "a cache of its own form": self.kind is Kind.OTHER,
            "states of linear attention": self.kind is Kind.LINEAR or self.state_nbytes > 0,
            "another layer's cache": self.kind is Kind.SHARED,
            "a soft cap on scores": self.softcap is not None,
            "sink logits": self.sink_logits,
        }
        return tuple(name for name, there in named.items() if there)

    def held_tokens(self, tokens: int) -> int:
        """How many of `tokens` tokens transformers' own cache holds: a window less the token that comes next."""
        return tokens if self.window is None else min(tokens, max(1, self.window - 1))

    def nbytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of `tokens` tokens of one sequence in transformers' own cache, states included."""
        return self.held_tokens(tokens) * self.cached_width * itemsize + self.state_nbytes


def read_layer(index: int, keeping: Keeping, module: nn.Module | None, config: object) -> LayerFacts:
    """The facts of one layer, without its states and its readers.

    Args:
        index: of its cache layer.
        keeping: what transformers keeps of it.
        module: that attends there; None where none does.
        config: of the layer.
    """
    if module is None:
        kind = Kind.NONE if keeping.kind is Kind.FULL else keeping.kind
        return LayerFacts(index, kind, keeping.window)
    heads = _first(HEADS, module, config) or 1
    latent = _latent(module)
    if latent is not None:
        shape = (1, latent.kv_lora_rank, latent.qk_rope_head_dim)
    else:
        shape = _key_value_shape(module, config, heads)
    return LayerFacts(
        index,
        Kind.LATENT if latent is not None and keeping.kind is Kind.FULL else keeping.kind,
        keeping.window,
        heads,
        *shape,
        latent=latent,
        softcap=_softcap(module),
        sink_logits=_has_sink_logits(module, heads),
    )


def _key_value_shape(module: nn.Module, config: object, heads: int) -> tuple[int, int, int]:
    """(N, dimension of keys, dimension of values)."""
    head_dim = _first(HEAD_DIM, module, config) or (_first(("hidden_size",), config) or 0) // heads
    kv_heads = _first(KEY_VALUE_HEADS, module)
    groups = _first(("num_key_value_groups",), module)
    if kv_heads is None:
        kv_heads = heads // groups if groups else _first(KEY_VALUE_HEADS, config) or heads
    keys, values, fused = (_out_features(module, pattern) for pattern in (KEYS_ALONE, VALUES_ALONE, FUSED))
    if keys is not None and keys % head_dim == 0:
        kv_heads = keys // head_dim
    elif fused is not None and fused % head_dim == 0 and (fused // head_dim - heads) % 2 == 0:
        kv_heads = (fused // head_dim - heads) // 2
    value_head_dim = values // kv_heads if values is not None and values % kv_heads == 0 else head_dim
    return kv_heads, head_dim, value_head_dim


def _out_features(module: nn.Module, pattern: re.Pattern[str]) -> int | None:
    found = projection(module, pattern)
    return None if found is None else out_features(found)


def _latent(module: nn.Module) -> LatentFacts | None:
    names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    shapes = [getattr(module, name, None) for name in names]
    if not hasattr(module, "expand_kv") or not all(isinstance(shape, int) for shape in shapes):
        return None
    return LatentFacts(*shapes)  # type: ignore[arg-type]


def _softcap(module: nn.Module) -> float | None:
    found = [value for name, value in vars(module).items() if "softcap" in name and isinstance(value, (int, float))]
    return float(found[0]) if found else None


def _has_sink_logits(module: nn.Module, heads: int) -> bool:
    return any("sink" in name and parameter.numel() == heads for name, parameter in _own(module))


def _own(module: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _first(names: Iterable[str], *places: object) -> int | None:
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None
