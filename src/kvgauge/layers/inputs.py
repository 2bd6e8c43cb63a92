"""What the attention modules were given by the passes that filled a cache: some methods choose by more than keys."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.architecture.facts import attention_modules
from kvgauge.layers.cache import KVCache

LayerInput = tuple[Tensor, Tensor, Tensor]  # hidden states (batch, tokens, D); cosines and sines (…, tokens, head_dim)


class LayerInputs:
    """Keeps the inputs of every attention module, in as many passes as it takes, until `stop` or the cache's end.

    Args:
        model: whose modules are watched.
        cache: only passes that fill it count.

    Attributes:
        layers: of each layer that may be compressed, None before the first pass; whoever has read a layer's may set it
            to None.
    """

    def __init__(self, model: PreTrainedModel, cache: KVCache) -> None:
        modules = attention_modules(model)
        places = {id(module): index for index, module in enumerate(modules)}
        self.layers: list[LayerInput | None] = [None for _ in modules]
        mine, filled = weakref.ref(self), weakref.ref(cache)

        def record(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            inputs, wanted = mine(), filled()
            if inputs is not None and wanted is not None and wanted is kwargs.get("past_key_values"):
                inputs._record(places[id(module)], (kwargs["hidden_states"], *kwargs["position_embeddings"]))

        handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
        self.stop = weakref.finalize(self, _remove, handles)

    def share(self, other: LayerInputs) -> None:
        """Take over what another cache's passes gave; nothing is copied."""
        self.layers = list(other.layers)

    def _record(self, index: int, new: LayerInput) -> None:
        known = self.layers[index]
        if known is not None:
            (hidden, cos, sin), (more, more_cos, more_sin) = known, new
            new = (torch.cat([hidden, more], dim=1), _joined(cos, more_cos), _joined(sin, more_sin))
        self.layers[index] = new

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` tokens."""
        self._map(lambda part: part[:, :tokens], lambda part: part[:, :tokens])

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        """Apply a selection along the batch."""
        self._map(select, lambda part: select(part) if part.shape[0] > 1 else part)

    def _map(self, states: Callable[[Tensor], Tensor], angles: Callable[[Tensor], Tensor]) -> None:
        for index, known in enumerate(self.layers):
            if known is not None:
                hidden, cos, sin = known
                self.layers[index] = (states(hidden), angles(cos), angles(sin))


def _joined(first: Tensor, second: Tensor) -> Tensor:
    rows = max(first.shape[0], second.shape[0])
    return torch.cat([first.expand(rows, -1, -1), second.expand(rows, -1, -1)], dim=1)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
