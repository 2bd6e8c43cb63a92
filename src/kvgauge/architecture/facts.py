"""The few facts that methods need of an architecture, read from the model itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvgauge.errors import UserError


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
class ModelFacts:
    """Shapes of a model's attention, one value for all layers.

    With multi-head latent attention the cache holds one latent and one rotary key per token, whatever the number of
    heads: `num_key_value_heads` is 1 and `head_dim` is the dimension of the latent there.

    Attributes:
        num_layers: decoder layers.
        num_attention_heads: query heads H.
        num_key_value_heads: key/value heads N.
        head_dim: dimension d of a head.
        hidden_size: D.
        max_positions: longest context the positions were made for.
        dtype: of the weights, and so of the cache.
        latent: shapes of MLA; None for models that cache keys and values per head.
    """

    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    max_positions: int
    dtype: torch.dtype
    latent: LatentFacts | None = None

    @property
    def cached_width(self) -> int:
        """Numbers that the uncompressed cache holds per token and layer."""
        if self.latent is not None:
            return self.latent.kv_lora_rank + self.latent.qk_rope_head_dim
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def num_key_value_groups(self) -> int:
        """Query heads that share a key/value head: g = H / N."""
        return self.num_attention_heads // self.num_key_value_heads

    def full_nbytes(self, tokens: int, bits: int | None = None) -> int:
        """Bytes of the uncompressed cache of `tokens` tokens of one sequence: keys and values, or MLA's latents.

        Args:
            tokens: of the sequence.
            bits: of a number; None for those of the model's dtype.
        """
        itemsize = self.dtype.itemsize if bits is None else bits // 8
        return self.num_layers * self.cached_width * itemsize * tokens

    def expanded_nbytes(self, tokens: int) -> int:
        """Bytes of the keys and values of all heads of `tokens` tokens: what MLA's latents stand for.

        For models without MLA the same as `full_nbytes`.
        """
        if self.latent is None:
            return self.full_nbytes(tokens)
        per_head = self.latent.qk_nope_head_dim + self.latent.qk_rope_head_dim + self.latent.v_head_dim
        return self.num_layers * self.num_attention_heads * per_head * self.dtype.itemsize * tokens


def model_facts(model: PreTrainedModel) -> ModelFacts:
    """The `ModelFacts` of a transformers decoder."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    latent = None
    if getattr(config, "kv_lora_rank", None):
        latent = LatentFacts(config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelFacts(
        num_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads if latent is None else 1,
        head_dim=head_dim if latent is None else latent.kv_lora_rank,
        hidden_size=config.hidden_size,
        max_positions=config.max_position_embeddings,
        dtype=model.dtype,
        latent=latent,
    )


def full_nbytes(model: PreTrainedModel, tokens: int, bits: int | None = None) -> int:
    """Bytes of the uncompressed cache of one sequence of `tokens` tokens, of the model's dtype or `bits` a number."""
    return model_facts(model).full_nbytes(tokens, bits)


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The self-attention modules, first layer first."""
    return [layer.self_attn for layer in model.get_decoder().layers]


def output_weight(model: PreTrainedModel, layer: int) -> Tensor:
    """W_O of one layer as (num_attention_heads, head_dim, hidden_size), a view: head h adds ``o_h @ W_O[h]``."""
    weight: Tensor = attention_modules(model)[layer].o_proj.weight  # type: ignore[union-attr, assignment]
    heads = model.config.get_text_config().num_attention_heads
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
