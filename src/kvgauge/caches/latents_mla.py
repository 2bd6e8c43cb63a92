"""KQ-SVD on multi-head latent attention: r numbers instead of kv_lora_rank for every latent.

A latent is key and value at once, so one pair (A, B) serves both: ``C̃ = C A`` is stored, scores are ``(q B) C̃ᵀ`` and
sums are expanded once, ``(p C̃) Bᵀ``. The rotary keys stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvgauge.caches.attention import Segment
from kvgauge.caches.buffers import GrowingBuffer
from kvgauge.caches.mla import LatentAttentionLayer


@dataclass
class ProjectedLatents:
    """Projected latents and rotary keys (batch, 1, tokens, dimension) as a segment of attention.

    Attributes:
        latents: C A.
        rotary: of the same tokens.
        B: (kv_lora_rank, rank).
    """

    latents: Tensor
    rotary: Tensor
    B: Tensor
    num_key_value_heads: int = 1

    def __len__(self) -> int:
        return self.latents.shape[2]

    def scores(self, query: Tensor) -> Tensor:
        """See `kvgauge.caches.attention.Segment`; queries are absorbed."""
        latent, rotary = query.split([self.B.shape[0], self.rotary.shape[-1]], dim=-1)
        return (latent @ self.B) @ self.latents.transpose(-1, -2) + rotary @ self.rotary.transpose(-1, -2)

    def mix(self, weights: Tensor) -> Tensor:
        """Weighted sums of the approximated latents."""
        return (weights @ self.latents) @ self.B.T


class ProjectedLatentLayer(LatentAttentionLayer):
    """One layer of projected latents; tokens after the compression are projected too.

    Args:
        A, B: the pair, (kv_lora_rank, rank) each, in the model's dtype.
    """

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.A, self.B = A, B
        self.latents, self.rotary_keys = GrowingBuffer(), GrowingBuffer()

    def store(self, keys: Tensor, values: Tensor) -> None:
        self.latents.set(keys @ self.A)
        self.rotary_keys.set(values)

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.latents.append(keys @ self.A)
        self.rotary_keys.append(values)

    def segments(self) -> list[Segment]:
        return [ProjectedLatents(self.latents.view(), self.rotary_keys.view(), self.B)]

    def compressed_nbytes_by_part(self) -> dict[str, int]:
        return {"latents": self.latents.nbytes(), "rotary_keys": self.rotary_keys.nbytes()}

    def fixed_nbytes(self) -> int:
        return self.A.nbytes + self.B.nbytes

    def compressed_dense(self) -> tuple[Tensor, Tensor]:
        return self.latents.view() @ self.B.T, self.rotary_keys.view()

    def buffers(self) -> Sequence[GrowingBuffer]:
        return (self.latents, self.rotary_keys)

    def crop_compressed(self, tokens: int) -> None:
        self.latents.crop(tokens)
        self.rotary_keys.crop(tokens)
