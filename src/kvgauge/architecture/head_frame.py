"""How the dimensions of a head make planes, and what stands between them and what is cached."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class HeadFrame:
    """The dimensions of a head in the order of planes: all first coordinates, then all second ones.

    In that frame every rotation turns dimension i with dimension ``i + head_dim / 2``, as Llama's does. Scores do not
    change: queries are brought into it along with keys.

    Attributes:
        order: (head_dim,), where each dimension of the frame stands in the model; None: where it is.
        weight: (head_dim,), of a normalisation behind the rotation, which multiplied the keys, in the model's order;
            None where there is none. Keys of the frame are free of it, queries of the frame carry it.
    """

    order: Tensor | None = None
    weight: Tensor | None = None

    def to(self, device: torch.device) -> HeadFrame:
        """The same on a device, where it is used without copies."""
        return HeadFrame(*(None if part is None else part.to(device) for part in (self.order, self.weight)))

    @property
    def identity(self) -> bool:
        """Keys and queries of the frame are the model's own."""
        return self.order is None and self.weight is None

    def keys(self, keys: Tensor) -> Tensor:
        """Keys (…, head_dim) of the model, in the frame."""
        return self._ordered(keys if self.weight is None else keys / self._weight(keys))

    def queries(self, queries: Tensor) -> Tensor:
        """Queries (…, head_dim) of the model, in the frame."""
        return self._ordered(queries if self.weight is None else queries * self._weight(queries))

    def model_keys(self, keys: Tensor) -> Tensor:
        """The inverse of `keys`."""
        keys = self._disordered(keys)
        return keys if self.weight is None else keys * self._weight(keys)

    def model_queries(self, queries: Tensor) -> Tensor:
        """The inverse of `queries`."""
        queries = self._disordered(queries)
        return queries if self.weight is None else queries / self._weight(queries)

    def _weight(self, like: Tensor) -> Tensor:
        assert self.weight is not None
        return self.weight.to(like.device, like.dtype)

    def _ordered(self, states: Tensor) -> Tensor:
        return states if self.order is None else states[..., self.order.to(states.device)]

    def _disordered(self, states: Tensor) -> Tensor:
        return states if self.order is None else states[..., self.order.argsort().to(states.device)]


def plane_order(head_dim: int, rotary_dim: int, *, interleaved: bool, last: bool) -> Tensor | None:
    """The `HeadFrame.order` of a rotation.

    Args:
        head_dim: of a head, even.
        rotary_dim: how many of its dimensions rotate.
        interleaved: a plane is two neighbours; otherwise it has one dimension in each half of the rotating ones.
        last: the rotating dimensions are the head's last ones, otherwise its first.
    """
    dims = torch.arange(head_dim)
    turned = dims[head_dim - rotary_dim :] if last else dims[:rotary_dim]
    still = dims[: head_dim - rotary_dim] if last else dims[rotary_dim:]
    first, second = (turned[0::2], turned[1::2]) if interleaved else turned.chunk(2)
    if not len(turned):
        first = second = turned
    others = still.chunk(2) if len(still) else (still, still)
    order = torch.cat([first, others[0], second, others[1]])
    return None if torch.equal(order, dims) else order
