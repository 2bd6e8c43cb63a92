"""The layer that nearly every method stores in: exact while the context is read, compressed from then on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor

from kvgauge.attend.attention import exact_attention
from kvgauge.attend.mask import CAUSAL, Mask
from kvgauge.errors import UserError
from kvgauge.layers.cache import LayerCache
from kvgauge.store.buffers import GrowingBuffer
from kvgauge.store.rows import RowBuffer


class TwoPhaseLayer(LayerCache):
    """Exact keys and values until `compress`, then whatever the subclass stores."""

    def __init__(self) -> None:
        super().__init__()
        self.exact_keys = GrowingBuffer()
        self.exact_values = GrowingBuffer()

    # -- what a subclass stores ----------------------------------------------------------------------------------

    @abstractmethod
    def store(self, keys: Tensor, values: Tensor) -> None:
        """Take over the exact keys and values of the context; called once, by `compress`.

        Args:
            keys, values: (batch, num_key_value_heads, tokens, head_dim), post-RoPE. They may share storage with
                something else: copy what is kept.
        """

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add the keys and values of new tokens after compression; shapes as in `store`."""

    @abstractmethod
    def attend_compressed(self, query: Tensor, mask: Mask, scaling: float) -> Tensor:
        """The attention output after compression; arguments and result as in `Attendable.attend`."""

    @abstractmethod
    def compressed_nbytes_by_part(self) -> dict[str, int]:
        """Bytes of the live tensors of all sequences after compression, by what they are for."""

    @abstractmethod
    def compressed_dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values as the compressed layer stands for them; shapes as in `store`. For measuring only."""

    @abstractmethod
    def buffers(self) -> Sequence[RowBuffer]:
        """Every buffer of the compressed layer whose first dimension is the batch."""

    def crop_compressed(self, tokens: int) -> None:
        """Keep the first `tokens` tokens of a compressed layer.

        Raises:
            UserError: the layer cannot.
        """
        raise UserError(f"{type(self).__name__} cannot be cropped after compression: start a new cache")

    # -- the contract of LayerCache ------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.came(key_states.shape[-2])
        if self.compressed:
            self.append(key_states.to(self.home), value_states.to(self.home))
        else:
            self.exact_keys.append(key_states)
            self.exact_values.append(value_states)
        return self, self

    def attend(self, query: Tensor, *, mask: Mask, scaling: float, position_ids: Tensor | None) -> Tensor:
        """See `kvgauge.attend.attention.Attendable`."""
        assert self.cache is not None
        if self.index == 0:
            self.cache.observe(query, mask, position_ids)
        output = self._attend(query, mask, scaling)
        self.cache.layer_done(self.index)
        return output

    def attend_again(self, query: Tensor, mask: Mask, scaling: float) -> Tensor:
        """See `LayerCache.attend_again`."""
        return self._attend(query, mask, scaling)

    def _attend(self, query: Tensor, mask: Mask, scaling: float) -> Tensor:
        if self.compressed:
            return self.attend_at_home(query, mask, scaling)
        if query.device == self.device:
            return self.attend_exact(query, mask, scaling)
        return self.attend_exact(query.to(self.device), mask.to(self.device), scaling).to(query.device)

    def attend_at_home(self, query: Tensor, mask: Mask, scaling: float) -> Tensor:
        """`attend_compressed` where the compressed tokens live: queries and outputs are what is small to move."""
        home = self.home
        if query.device == home:
            return self.attend_compressed(query, mask, scaling)
        return self.attend_compressed(query.to(home), mask.to(home), scaling).to(query.device)

    def attend_exact(self, query: Tensor, mask: Mask, scaling: float) -> Tensor:
        """The attention output before compression; arguments and result as in `Attendable.attend`."""
        return exact_attention(query, self.exact_keys.view(), self.exact_values.view(), mask, scaling)

    def compress(self) -> None:
        """Replace the exact keys and values by what the method stores; a second call does nothing."""
        if self.compressed or not self.is_initialized:
            return
        self.store(self.exact_keys.view().to(self.home), self.exact_values.view().to(self.home))
        self.exact_keys.clear()
        self.exact_values.clear()
        self.compressed = True

    def attend_entries(self, query: Tensor, scaling: float) -> Tensor:
        """See `LayerCache.attend_entries`."""
        return self._attend(query, CAUSAL, scaling)

    def share(self, keys: Tensor, values: Tensor) -> None:
        """See `LayerCache.share`."""
        self.lazy_initialization(keys, values)
        self.exact_keys.share(keys)
        self.exact_values.share(values)
        self.logical_length = keys.shape[2]

    def nbytes_by_part(self) -> dict[str, int]:
        """Bytes of the live tensors of all sequences, by what they are for."""
        exact = self.exact_keys.nbytes() + self.exact_values.nbytes()
        parts = self.compressed_nbytes_by_part() if self.compressed else {}
        return ({"exact": exact} if exact else {}) | parts

    def dense(self) -> tuple[Tensor, Tensor]:
        """(keys, values) as the model would have seen them, (batch, num_key_value_heads, tokens, head_dim)."""
        return self.compressed_dense() if self.compressed else (self.exact_keys.view(), self.exact_values.view())

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise UserError("crop takes the number of tokens to remove as a negative number")
        kept = self.logical_length + tokens_to_remove
        if tokens_to_remove == 0:
            return
        if kept < 0:
            raise UserError(f"cannot remove {-tokens_to_remove} tokens of a cache of {self.logical_length}")
        if self.compressed:
            self.crop_compressed(kept)
        else:
            self.exact_keys.crop(kept)
            self.exact_values.crop(kept)
        self.logical_length = kept

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        for buffer in (self.exact_keys, self.exact_values):
            buffer.map_batch(select)
        super().map_batch(select)

    def reset(self) -> None:
        self.exact_keys.clear()
        self.exact_values.clear()
        super().reset()
