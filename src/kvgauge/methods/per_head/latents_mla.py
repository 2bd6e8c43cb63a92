"""KQ-SVD on multi-head latent attention: r numbers instead of kv_lora_rank for every latent.

A latent is key and value at once, so one pair (A, B) serves both: ``C̃ = C A`` is stored, scores are ``(q B) C̃ᵀ`` and
sums are expanded once, ``(p C̃) Bᵀ``. The rotary keys stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvgauge.attend.attention import Segment
from kvgauge.layers.mla import LatentAttentionLayer
from kvgauge.layers.pair import PairLayer
from kvgauge.store.buffers import GrowingBuffer


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
        """See `kvgauge.attend.attention.Segment`; queries are absorbed."""
        latent, rotary = query.split([self.B.shape[0], self.rotary.shape[-1]], dim=-1)
        return (latent @ self.B) @ self.latents.transpose(-1, -2) + rotary @ self.rotary.transpose(-1, -2)

    def mix(self, weights: Tensor) -> Tensor:
        """Weighted sums of the approximated latents."""
        return (weights @ self.latents) @ self.B.T


class ProjectedLatentLayer(LatentAttentionLayer, PairLayer):
    """One layer of projected latents; tokens after the compression are projected too.

    Args:
        A, B: the pair, (kv_lora_rank, rank) each, in the model's dtype.
    """

    parts = ("latents", "rotary_keys")

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__(GrowingBuffer(), GrowingBuffer())
        self.A, self.B = A, B

    def store(self, keys: Tensor, values: Tensor) -> None:
        self.keys_buffer.set(keys @ self.A)
        self.values_buffer.set(values)

    def append(self, keys: Tensor, values: Tensor) -> None:
        super().append(keys @ self.A, values)

    def segments(self) -> list[Segment]:
        return [ProjectedLatents(self.keys_buffer.dense(), self.values_buffer.dense(), self.B)]

    def fixed_nbytes(self) -> int:
        return self.A.nbytes + self.B.nbytes

    def compressed_dense(self) -> tuple[Tensor, Tensor]:
        latents, rotary = super().compressed_dense()
        return latents @ self.B.T, rotary
