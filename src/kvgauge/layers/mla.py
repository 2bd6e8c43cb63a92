"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): caches of latents, and attention in latent space.

A token's cache is the latent ``c`` (kv_lora_rank) and one rotary key, shared by all heads; a head's key is
``[W_UK c; k_rope]`` and its value ``W_UV c``. With W_UK absorbed into the query, a score is
``(q_nope W_UK) · c + q_rope · k_rope``, and with W_UV absorbed into the output, ``o = (p C) W_UVᵀ``: nothing is
expanded. A layer receives latents in the place of keys and rotary keys in the place of values, both
(batch, 1, tokens, dimension).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from kvgauge.attend.attention import Segment, exact_attention, segmented_attention
from kvgauge.attend.mask import Mask
from kvgauge.errors import UserError
from kvgauge.layers.pair import PreallocatedLayer
from kvgauge.layers.two_phase import TwoPhaseLayer


class UpProjections:
    """W_UK and W_UV of one attention module, (heads, dimension, kv_lora_rank) views of its ``kv_b_proj``."""

    def __init__(self, module: nn.Module) -> None:
        weight: Tensor = module.kv_b_proj.weight  # type: ignore[union-attr, assignment]
        self.nope, self.value_dim = int(module.qk_nope_head_dim), int(module.v_head_dim)  # type: ignore[arg-type]
        self.rank = weight.shape[1]
        self.keys, self.values = weight.view(-1, self.nope + self.value_dim, self.rank).split(
            [self.nope, self.value_dim], dim=1
        )

    def absorb(self, query: Tensor) -> Tensor:
        """Queries (batch, heads, queries, nope + rope) as they meet the cache: (…, kv_lora_rank + rope)."""
        nope, rope = query.split([self.nope, query.shape[-1] - self.nope], dim=-1)
        return torch.cat([nope @ self.keys, rope], dim=-1)

    def expand_output(self, output: Tensor) -> Tensor:
        """Weighted sums of latents (batch, queries, heads, kv_lora_rank) as outputs (batch, queries, heads, value)."""
        return (output.transpose(1, 2) @ self.values.transpose(1, 2)).transpose(1, 2)

    def expand(self, latents: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of all heads, (batch, heads, tokens, dimension), that stand behind the latents."""
        keys = latents @ self.keys.transpose(1, 2)
        shared = rotary.expand(-1, keys.shape[1], -1, -1)
        return torch.cat([keys, shared], dim=-1), latents @ self.values.transpose(1, 2)

    def cheaper_expanded(self, queries: int, tokens: int, rotary_dim: int) -> bool:
        """Whether many queries pay for expanding the tokens: multiplications of both ways, per head."""
        latent = queries * tokens * (2 * self.rank + rotary_dim)
        expanded = queries * tokens * (self.nope + rotary_dim + self.value_dim)
        return expanded + tokens * self.rank * (self.nope + self.value_dim) < latent


class LatentTokens:
    """Exact latents and rotary keys (batch, 1, tokens, dimension) as a segment of attention."""

    num_key_value_heads = 1

    def __init__(self, latents: Tensor, rotary: Tensor) -> None:
        self.latents, self.rotary = latents, rotary

    def __len__(self) -> int:
        return self.latents.shape[2]

    def scores(self, query: Tensor) -> Tensor:
        """See `kvgauge.attend.attention.Segment`; queries are absorbed."""
        latent, rotary = query.split([self.latents.shape[-1], self.rotary.shape[-1]], dim=-1)
        return latent @ self.latents.transpose(-1, -2) + rotary @ self.rotary.transpose(-1, -2)

    def mix(self, weights: Tensor) -> Tensor:
        """Weighted sums of the latents."""
        return weights @ self.latents


class TakesLatents:
    """Marks a layer whose `attend` takes the queries of an MLA model and returns its outputs.

    Attributes:
        projections: of the module that attends, set before every attention: the layer itself holds no weights.
    """

    projections: UpProjections | None = None


class LatentAttentionLayer(TakesLatents, TwoPhaseLayer):
    """A layer of an MLA model: what it stores stands for latents and rotary keys."""

    @abstractmethod
    def segments(self) -> list[Segment]:
        """What absorbed queries attend to after compression, in logical order."""

    def attend_exact(self, query: Tensor, mask: Mask, scaling: float) -> Tensor:
        assert self.projections is not None
        latents, rotary = self.exact_keys.view(), self.exact_values.view()
        if self.projections.cheaper_expanded(query.shape[2], latents.shape[2], rotary.shape[3]):
            keys, values = self.projections.expand(latents, rotary)
            return exact_attention(query, keys, values, mask, scaling)
        return self._attend_segments([LatentTokens(latents, rotary)], query, mask, scaling, query.device)

    def attend_compressed(self, query: Tensor, mask: Mask, scaling: float) -> Tensor:
        return self._attend_segments(self.segments(), query, mask, scaling, self.home)

    def attend_at_home(self, query: Tensor, mask: Mask, scaling: float) -> Tensor:
        return self.attend_compressed(query, mask, scaling)  # the up-projections stay with the model's layer

    def _attend_segments(
        self, segments: list[Segment], query: Tensor, mask: Mask, scaling: float, home: torch.device
    ) -> Tensor:
        assert self.projections is not None
        absorbed = self.projections.absorb(query).to(home)
        output = segmented_attention(absorbed, segments, mask.to(home), scaling)
        return self.projections.expand_output(output.to(query.device))


class ExactLatentLayer(LatentAttentionLayer, PreallocatedLayer):
    """Every latent and rotary key: the uncompressed cache of an MLA model."""

    parts = ("latents", "rotary_keys")

    def segments(self) -> list[Segment]:
        return [LatentTokens(self.keys_buffer.dense(), self.values_buffer.dense())]


class LatentAttendable:
    """What stands in the place of the keys of an MLA module: a layer, and the module's up-projections.

    Raises:
        UserError: the layer does not know latents.
    """

    def __init__(self, layer: object, module: nn.Module) -> None:
        if not isinstance(layer, TakesLatents):
            raise UserError(
                f"{type(layer).__name__} needs keys and values per head, and this model caches latents (MLA): "
                f"use full, xkv, ksvd or kqsvd"
            )
        self.layer: Any = layer
        self.projections = UpProjections(module)

    def attend(self, query: Tensor, *, mask: Mask, scaling: float, position_ids: Tensor | None) -> Tensor:
        """See `kvgauge.attend.attention.Attendable`."""
        self.layer.projections = self.projections
        output: Tensor = self.layer.attend(query, mask=mask, scaling=scaling, position_ids=position_ids)
        return output
