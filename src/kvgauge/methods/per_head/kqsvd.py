"""KQ-SVD (arXiv 2512.05916, AISTATS 2026): the closed-form optimal low rank of the attention matrix K Qᵀ itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.architecture.facts import latent_output_weight, model_facts, output_weight
from kvgauge.contract.method import Needs
from kvgauge.errors import UserError
from kvgauge.methods.per_head.factorization import Pair, product_pair
from kvgauge.methods.per_head.low_rank import LowRankPerHead

if TYPE_CHECKING:
    from kvgauge.calibration.moments import Moments


@dataclass(frozen=True, kw_only=True)
class KQSVD(LowRankPerHead):
    """Keys: the best rank-r factorisation of ``K Qᵀ``. Values: of ``V W_O``.

    Attributes:
        group_weights: what stands for W_O where g query heads share a value head: ``average`` takes the mean of their
            W_O, as the paper's code does; ``stack`` sets them side by side, which is exact for the sum of squared
            errors over the heads.
        balanced: scale the pairs so that latents and projected queries have the same norms (see `product_pair`).
    """

    name: str = "kqsvd"
    group_weights: str = "average"
    balanced: bool = True

    @property
    def needs(self) -> Needs:
        needs = super().needs
        own = {"group_weights": self.group_weights, "balanced": self.balanced}
        return replace(needs, learns=dict(needs.learns or {}) | own)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_weights not in ("average", "stack"):
            raise UserError(f"group_weights of {self.name} is `average` or `stack`, not {self.group_weights!r}")

    def key_pair(self, moments: Moments) -> Pair:
        return product_pair(moments.keys(self.rope), moments.queries(self.rope), balanced=self.balanced)

    def value_pair(self, moments: Moments, model: PreTrainedModel) -> Pair:
        output = torch.stack(
            [self.output_moment(model, layer).to(moments.values().device) for layer in range(moments.num_layers)]
        )
        return product_pair(moments.values(), output, balanced=self.balanced)

    def latent_pair(self, moments: Moments, model: PreTrainedModel) -> Pair:
        """The pair that is optimal for both products of a latent, ``C [Q/‖CQᵀ‖, W/‖CW‖]``, set side by side.

        With W_UK absorbed, all heads' queries Q meet the same latents C in the scores ``C Qᵀ``; with W_UV absorbed, the
        output is made of ``C W``, ``W_h = W_UVᵀ W_O`` of every head. C is stored once, so a single rank-r factor must
        serve both; the closed form minimises the sum of their relative squared errors.
        """
        latents, queries = moments.keys(self.rope), moments.queries(self.rope)
        outputs = []
        for layer in range(moments.num_layers):
            weight = latent_output_weight(model, layer).double()
            outputs.append(torch.einsum("hrd,hsd->rs", weight, weight)[None].to(latents.device))
        products = (queries, torch.stack(outputs))
        scaled = [right / (latents * right).sum(dim=(-2, -1), keepdim=True) for right in products]
        return product_pair(latents, scaled[0] + scaled[1], balanced=self.balanced)

    def energies(self, spectrum: Tensor) -> Tensor:
        return spectrum

    def output_moment(self, model: PreTrainedModel, layer: int) -> Tensor:
        """``C_W`` of a layer: (num_key_value_heads, head_dim, head_dim), float64; see `group_weights`."""
        heads = output_weight(model, layer).double()
        grouped = heads.unflatten(0, (model_facts(model).num_key_value_heads, -1))
        if self.group_weights == "average":
            mean = grouped.mean(dim=1)
            return mean @ mean.transpose(-1, -2)
        return torch.einsum("ngdo,ngeo->nde", grouped, grouped)
