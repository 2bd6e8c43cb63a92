"""Models with multi-head latent attention (DeepSeek-V2 and those after it): attention that expands nothing cached.

transformers' own modules hand latents to the cache and expand keys and values of all heads from what comes back, all
cached tokens at every step. The modules here leave that out where a cache of ours attends by itself.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from kvgauge.layers.mla import LatentAttendable


class LatentAttention(nn.Module):
    """Stands before an MLA module's own class, and does not expand what one of our caches holds."""

    def expand_kv(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Any, Any]:
        """As the module's own for tensors; a cache layer in their place attends in latent space."""
        if isinstance(kv_nope, Tensor):
            expanded: tuple[Any, Any] = super().expand_kv(kv_nope, k_rot)  # type: ignore[misc]
            return expanded
        return LatentAttendable(kv_nope, self), None


@cache
def latent_class(own: type[nn.Module]) -> type[nn.Module]:
    """The class of an MLA module with `LatentAttention` before it."""
    return type(f"Latent{own.__name__}", (LatentAttention, own), {})


def install(model: PreTrainedModel) -> None:
    """Let MLA modules attend in latent space; other modules, and results with other caches, do not change."""
    for module in model.modules():
        if hasattr(module, "expand_kv") and hasattr(module, "kv_b_proj") and not isinstance(module, LatentAttention):
            own: Any = type(module)
            module.__class__ = latent_class(own)
