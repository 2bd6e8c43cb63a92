"""Models with multi-head latent attention (DeepSeek-V2 and V3): what they cache, and attention without expanding it.

transformers' own modules hand latents to the cache and expand keys and values of all heads from what comes back, all
cached tokens at every step. The modules here leave that out where a cache of ours attends by itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from kvgauge.layers.mla import LatentAttendable


class LatentDeepseekV2Attention(DeepseekV2Attention):
    """DeepSeek-V2 attention that does not expand what one of our caches holds."""

    def expand_kv(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Any, Any]:
        """As the parent's for tensors; a cache layer in their place attends in latent space."""
        if isinstance(kv_nope, Tensor):
            return super().expand_kv(kv_nope, k_rot)
        return LatentAttendable(kv_nope, self), None


class LatentDeepseekV3Attention(DeepseekV3Attention):
    """DeepSeek-V3 attention that does not expand what one of our caches holds."""

    def expand_kv(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Any, Any]:
        """As the parent's for tensors; a cache layer in their place attends in latent space."""
        if isinstance(kv_nope, Tensor):
            return super().expand_kv(kv_nope, k_rot)
        return LatentAttendable(kv_nope, self), None


LATENT_MODULES: dict[type[nn.Module], type[nn.Module]] = {
    DeepseekV2Attention: LatentDeepseekV2Attention,
    DeepseekV3Attention: LatentDeepseekV3Attention,
}


def install(model: PreTrainedModel) -> None:
    """Let MLA modules attend in latent space; other modules, and results with other caches, do not change."""
    for module in model.modules():
        latent = LATENT_MODULES.get(type(module))
        if latent is not None:
            module.__class__ = latent
