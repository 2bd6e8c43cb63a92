"""One token at a time through a model: what its own code makes of it at any position.

A sequence of one token attends to itself alone, whatever its position: every layer gives the same hidden state at every
position, and what differs in the keys is the rotation and nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from kvgauge.architecture.modules import decoder
from kvgauge.errors import UserError

TOKENS = 4


@dataclass
class Glimpse:
    """What the layers of a model cached of `TOKENS` tokens, each a sequence of its own, at every position asked for.

    Attributes:
        keys, values: by layer, (positions, TOKENS, num_key_value_heads, dimension), as the cache was given them.
        state_nbytes: by layer, bytes of one sequence's recurrent and convolutional states.
        positioned: the model takes positions; where not, all are the first.
    """

    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    state_nbytes: dict[int, int] = field(default_factory=dict)
    positioned: bool = True


class _Watched(DynamicCache):
    """transformers' own cache of a model, which remembers what it was given."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(config=model.config)
        self.given: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.given[layer_idx] = (key_states, value_states)
        updated: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return updated


@torch.no_grad()
def glimpse(model: PreTrainedModel, positions: Sequence[int]) -> Glimpse:
    """Run `TOKENS` random tokens, each alone, through the decoder at every one of `positions`.

    Raises:
        UserError: the model does not run with transformers' own cache.
    """
    root = decoder(model)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(0))
    batch = ids.repeat(len(positions))[:, None].to(model.device)
    taken = inspect.signature(root.forward).parameters
    seen = Glimpse(positioned="position_ids" in taken)
    places = torch.tensor(positions, device=model.device).repeat_interleave(TOKENS)[:, None]
    cache, training = _Watched(model), model.training
    model.eval()
    try:
        root(
            input_ids=batch,
            past_key_values=cache,
            use_cache=True,
            **({"position_ids": places} if seen.positioned else {}),
        )
    except UserError:
        raise
    except Exception as error:  # whatever it is, the model cannot be looked at
        reason = str(error)[:160]
        raise UserError(f"{type(model).__name__} does not run with transformers' own cache: {reason}") from error
    finally:
        model.train(training)
    for layer, (keys, values) in cache.given.items():
        for store, states in ((seen.keys, keys), (seen.values, values)):
            store[layer] = states[:, :, 0].unflatten(0, (len(positions), TOKENS))
    for index, layer_cache in enumerate(cache.layers):
        if isinstance(layer_cache, LinearAttentionCacheLayerMixin):
            held = (*layer_cache.conv_states.values(), *layer_cache.recurrent_states.values())
            seen.state_nbytes[index] = sum(state.nbytes for state in held if state is not None) // len(batch)
    return seen
