"""The facts that methods need of an architecture, read from the model itself, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from kvgauge.architecture.glimpse import glimpse
from kvgauge.architecture.kinds import Kind, keepings
from kvgauge.architecture.layer import LatentFacts, LayerFacts, read_layer
from kvgauge.architecture.modules import OUTPUT_PROJECTION, cached_attention, projection, weight_of
from kvgauge.errors import UserError

UNLIMITED = 2**31 - 1  # positions of a model that has no table of them


@dataclass(frozen=True)
class ModelFacts:
    """Shapes of a model's attention.

    Methods see the layers whose cache grows with the whole context, and only those: `num_layers` counts them, and the
    shapes are theirs. What other layers hold (windows, states of linear attention) stays with transformers; it counts
    in `full_nbytes` and is `others_nbytes`.

    With multi-head latent attention the cache holds one latent and one rotary key per token, whatever the number of
    heads: `num_key_value_heads` is 1 and `head_dim` is the dimension of the latent there.

    Attributes:
        num_layers: layers that may be compressed.
        num_attention_heads: query heads H.
        num_key_value_heads: key/value heads N.
        head_dim: dimension d of a key.
        hidden_size: D.
        max_positions: longest context the positions were made for.
        dtype: of the weights, and so of the cache.
        latent: shapes of MLA; None for models that cache keys and values per head.
        layers: of the whole model, as transformers' cache has them.
        name: of the model's class, for messages.
    """

    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    max_positions: int
    dtype: torch.dtype
    latent: LatentFacts | None = None
    layers: tuple[LayerFacts, ...] = ()
    name: str = ""

    @property
    def compressed(self) -> tuple[int, ...]:
        """Where in the cache the layers stand that may be compressed."""
        return tuple(layer.index for layer in self.layers if layer.compressible)

    @property
    def uniform(self) -> bool:
        """All layers that may be compressed have the same heads, and values the dimension of keys."""
        return self.uneven is None

    @property
    def uneven(self) -> str | None:
        """What keeps the shapes from being uniform, in words."""
        shapes = {layer.shape: layer.index for layer in map(self.layers.__getitem__, self.compressed)}
        if len(shapes) > 1:
            (first, one), (second, other) = list(shapes.items())[:2]
            return f"layers of different heads (layer {one} has {_words(first)}, layer {other} {_words(second)})"
        if self.latent is None and any(keys != values for _, _, keys, values in shapes):
            return f"values of {self.value_head_dim} dimensions beside keys of {self.head_dim}"
        return None

    @property
    def value_head_dim(self) -> int:
        """Dimension of a value; of the rotary key for latents."""
        return self.layers[self.compressed[0]].value_head_dim if self.compressed else self.head_dim

    @property
    def cached_width(self) -> int:
        """Numbers that the uncompressed cache holds per token and layer that may be compressed."""
        if self.latent is not None:
            return self.latent.kv_lora_rank + self.latent.qk_rope_head_dim
        return self.num_key_value_heads * (self.head_dim + self.value_head_dim)

    @property
    def num_key_value_groups(self) -> int:
        """Query heads that share a key/value head: g = H / N."""
        return self.num_attention_heads // self.num_key_value_heads

    def full_nbytes(self, tokens: int, bits: int | None = None) -> int:
        """Bytes of `tokens` tokens of one sequence in the cache that transformers itself makes for the model.

        Args:
            tokens: of the sequence.
            bits: of a number of keys, values and latents; None for those of the model's dtype. States of linear
                attention are what they are.
        """
        return self._nbytes(self.layers, tokens, bits)

    def others_nbytes(self, tokens: int, bits: int | None = None) -> int:
        """The part of `full_nbytes` that is in layers which are left to transformers, and in states."""
        others = [layer if not layer.compressible else _state_alone(layer) for layer in self.layers]
        return self._nbytes(others, tokens, bits)

    def compressed_nbytes(self, tokens: int, bits: int | None = None) -> int:
        """The part of `full_nbytes` that is in layers which may be compressed."""
        return self.full_nbytes(tokens, bits) - self.others_nbytes(tokens, bits)

    def expanded_nbytes(self, tokens: int) -> int:
        """Bytes of the keys and values of all heads of `tokens` tokens: what MLA's latents stand for.

        For models without MLA the same as `full_nbytes`.
        """
        if self.latent is None:
            return self.full_nbytes(tokens)
        per_head = self.latent.qk_nope_head_dim + self.latent.qk_rope_head_dim + self.latent.v_head_dim
        expanded = self.num_layers * self.num_attention_heads * per_head * self.dtype.itemsize * tokens
        return expanded + self.others_nbytes(tokens)

    def check(self, name: str, *, uneven: bool = True, per_head: str | None = None) -> None:
        """Refuse a model that a method cannot serve.

        Args:
            name: of the method.
            uneven: the method serves layers of different heads.
            per_head: what the method does to keys and values of heads ("merges"), where it serves no latents.

        Raises:
            UserError: no layer may be compressed, not all are alike and the method needs that, or what is cached are
                latents and the method needs heads.
        """
        if not self.num_layers:
            raise UserError(f"{name} has nothing to compress in {self.name}: {self._why_nothing()}")
        if per_head is not None and self.latent is not None:
            raise UserError(
                f"{name} {per_head} keys and values per head, and this model caches latents (MLA): "
                f"use xkv, kqsvd or full"
            )
        if not uneven and self.uneven is not None:
            raise UserError(f"{name} does not serve {self.name}: it has {self.uneven}")

    def _nbytes(self, layers: tuple[LayerFacts, ...] | list[LayerFacts], tokens: int, bits: int | None) -> int:
        itemsize = self.dtype.itemsize if bits is None else bits // 8
        return sum(layer.nbytes(tokens, itemsize) for layer in layers)

    def _why_nothing(self) -> str:
        windows = [layer.window for layer in self.layers if layer.window is not None]
        if windows:
            return (
                f"every layer has a window of {max(windows)} tokens; where contexts stay below that, "
                f"turn it off with model.config={{sliding_window: null}}"
            )
        return f"its layers are {', '.join(sorted({layer.kind.value for layer in self.layers}))}"


def _words(shape: tuple[int, int, int, int]) -> str:
    heads, kv_heads, keys, values = shape
    return f"{heads}/{kv_heads} of {keys}" + (f"+{values}" if keys != values else "")


def _state_alone(layer: LayerFacts) -> LayerFacts:
    return replace(layer, kind=Kind.LINEAR)


def model_facts(model: PreTrainedModel) -> ModelFacts:
    """The `ModelFacts` of a transformers decoder.

    Raises:
        UserError: transformers makes no cache for it, or its layers are none that are known.
    """
    layers = _layer_facts(model)
    config = model.config.get_text_config(decoder=True)
    chosen = [layer for layer in layers if layer.compressible]
    shown = (chosen or [layer for layer in layers if layer.num_attention_heads] or [LayerFacts(0, Kind.NONE)])[0]
    return ModelFacts(
        num_layers=len(chosen),
        num_attention_heads=shown.num_attention_heads,
        num_key_value_heads=shown.num_key_value_heads,
        head_dim=shown.head_dim,
        hidden_size=config.hidden_size,
        max_positions=_max_positions(config),
        dtype=model.dtype,
        latent=shown.latent,
        layers=layers,
        name=type(model).__name__,
    )


def _max_positions(config: PretrainedConfig) -> int:
    """Those of the configuration; dynamic rotary frequencies serve `factor` times as many (arXiv 2309.00071)."""
    trained = getattr(config, "max_position_embeddings", None) or UNLIMITED
    rotary = getattr(config, "rope_parameters", None) or {}
    factor = rotary.get("factor") if rotary.get("rope_type") == "dynamic" else None
    return int(trained * (factor or 1))


def _layer_facts(model: PreTrainedModel) -> tuple[LayerFacts, ...]:
    known: tuple[torch.dtype, tuple[LayerFacts, ...]] | None = getattr(model, "_kvgauge_layer_facts", None)
    if known is not None and known[0] == model.dtype:
        return known[1]
    text = model.config.get_text_config(decoder=True)
    kept, modules, configs = keepings(model.config), cached_attention(model), list(text.per_layer_config)
    if any(index >= len(kept) for index in modules):
        raise UserError(
            f"{type(model).__name__} has {len(modules)} attention modules and its cache {len(kept)} layers: "
            f"not supported"
        )
    configs += [text] * (len(kept) - len(configs))
    layers = [read_layer(index, keeping, modules.get(index), configs[index]) for index, keeping in enumerate(kept)]
    layers = _with_sharing(layers, text)
    if any(keeping.state for keeping in kept):
        states = glimpse(model, [0]).state_nbytes
        layers = [replace(layer, state_nbytes=states.get(layer.index, 0)) for layer in layers]
    model._kvgauge_layer_facts = (model.dtype, tuple(layers))
    return tuple(layers)


def _with_sharing(layers: list[LayerFacts], config: object) -> list[LayerFacts]:
    """The layers that read another's cache, and those that are read, know of each other."""
    modes, types = getattr(config, "kv_sharing_modes", None), getattr(config, "layer_types", None)
    if modes is None or types is None:
        return layers
    stores = {types[index]: index for index, mode in enumerate(modes) if mode == "store"}
    sources = {index: stores[types[index]] for index, mode in enumerate(modes) if mode == "reuse"}
    return [
        replace(
            layer,
            source=sources.get(layer.index),
            readers=tuple(reader for reader, source in sources.items() if source == layer.index),
        )
        for layer in layers
    ]


def full_nbytes(model: PreTrainedModel, tokens: int, bits: int | None = None) -> int:
    """Bytes of one sequence of `tokens` tokens in transformers' own cache, of the model's dtype or `bits` a number."""
    return model_facts(model).full_nbytes(tokens, bits)


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules of the layers that may be compressed, first layer first."""
    modules = cached_attention(model)
    return [modules[index] for index in model_facts(model).compressed]


def attention_device(model: PreTrainedModel, layer: int) -> torch.device:
    """Where a layer attends; layers are counted among those that may be compressed."""
    module = attention_modules(model)[layer]
    held: list[Tensor] = [*module.parameters(), *module.buffers()]  # packed weights are buffers
    return held[0].device


def output_weight(model: PreTrainedModel, layer: int) -> Tensor:
    """W_O of one layer as (num_attention_heads, value_head_dim, hidden_size), a view: head h adds ``o_h @ W_O[h]``.

    Args:
        model: any decoder.
        layer: counted among those that may be compressed.

    Raises:
        UserError: the layer has no single output projection.
    """
    facts = model_facts(model)
    module = attention_modules(model)[layer]
    found = projection(module, OUTPUT_PROJECTION)
    weight = None if found is None else weight_of(found)
    heads = facts.layers[facts.compressed[layer]].num_attention_heads
    if weight is None or weight.shape[1] % heads:
        raise UserError(
            f"{type(module).__name__} has no output projection of its heads: "
            f"use a method that does not weigh errors by it"
        )
    return weight.T.reshape(heads, weight.shape[1] // heads, weight.shape[0])


def latent_output_weight(model: PreTrainedModel, layer: int) -> Tensor:
    """``W_UVᵀ W_O`` of one MLA layer, (num_attention_heads, kv_lora_rank, hidden_size): head h adds ``(p C) W[h]``."""
    latent = model_facts(model).latent
    assert latent is not None
    weight: Tensor = attention_modules(model)[layer].kv_b_proj.weight  # type: ignore[union-attr, assignment]
    per_head = weight.view(-1, latent.qk_nope_head_dim + latent.v_head_dim, latent.kv_lora_rank)
    return per_head[:, latent.qk_nope_head_dim :].transpose(1, 2) @ output_weight(model, layer)


def check_length(model: PreTrainedModel, tokens: int, what: str = "the context") -> None:
    """Refuse more tokens than the model has positions.

    Raises:
        UserError: `tokens` exceeds ``max_position_embeddings``.
    """
    limit = model_facts(model).max_positions
    if tokens > limit:
        raise UserError(f"{what} of {tokens} tokens is longer than the model's {limit} positions: use a shorter length")
