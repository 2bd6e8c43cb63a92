"""What happens to attention scores before the softmax: a factor, and in some models a soft cap and sink logits.

Sink logits (one for every head) stand in the normaliser of the softmax and have no value: a head that finds nothing
attends to nothing. With the log-normaliser ``l`` of the tokens alone, the output is ``sigmoid(l − sink)`` of what
attention without sinks gives, so that joined runs of tokens need them only once.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Scaling(float):
    """The factor on the scores; as a number, that factor.

    A plain number is a scaling without a cap and without sinks. What takes a `Scaling` for a number and makes a softmax
    of its own must look at both (`of`).

    Args:
        factor: on the scores, 1/√head_dim as a rule.
        softcap: scores become ``softcap · tanh(scores / softcap)`` after the factor; None leaves them.
        sinks: (num_attention_heads,), in the normaliser of each head; None: there are none.
    """

    softcap: float | None
    sinks: Tensor | None

    def __new__(cls, factor: float, softcap: float | None = None, sinks: Tensor | None = None) -> Scaling:
        made = super().__new__(cls, factor)
        made.softcap, made.sinks = softcap, sinks
        return made

    @staticmethod
    def of(scaling: float) -> Scaling:
        """What a scaling does beside its factor: of a number nothing. No other use of the result counts."""
        return scaling if isinstance(scaling, Scaling) else NOTHING

    @property
    def plain(self) -> bool:
        """Nothing but a factor."""
        return self.softcap is None and self.sinks is None

    def capped(self, scores: Tensor) -> Tensor:
        """Scaled scores with the cap; in place where no gradient needs them."""
        if self.softcap is None:
            return scores
        if scores.requires_grad:
            return self.softcap * torch.tanh(scores / self.softcap)
        return scores.div_(self.softcap).tanh_().mul_(self.softcap)

    def weights(self, scores: Tensor) -> Tensor:
        """The softmax of scores that are scaled, capped and masked, beside the sinks; for measuring.

        Args:
            scores: (batch, num_attention_heads, queries, tokens).
        """
        shares = scores.softmax(dim=-1)
        if self.sinks is None:
            return shares
        sinks = self.sinks.to(scores)[:, None]
        return shares * torch.sigmoid(scores.logsumexp(dim=-1) - sinks).unsqueeze(-1)

    def share(self, normalisers: Tensor) -> Tensor | None:
        """What is left to the tokens beside the sinks.

        Args:
            normalisers: (batch, num_key_value_heads, rows), log-normalisers of the tokens alone; the rows are the
                query heads of a group, each with all its queries.

        Returns:
            A factor on the weights, shaped like the normalisers; None where there are no sinks.
        """
        if self.sinks is None:
            return None
        _, heads, rows = normalisers.shape
        sinks = self.sinks.to(normalisers).view(heads, -1)
        return torch.sigmoid(normalisers - sinks.repeat_interleave(rows // sinks.shape[1], dim=1))


NOTHING = Scaling(1.0)
