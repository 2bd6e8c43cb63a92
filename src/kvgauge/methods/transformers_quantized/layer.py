"""transformers' own quantised cache layers behind kvgauge's contract: the off-the-shelf reference.

The layers are transformers' (`QuantizedCache`); here they only get the exact context in one piece and their live
tensors are counted. They work as they do anywhere else: new tokens wait exactly until `residual_length` of them are
there, then the whole layer is decoded, joined and coded anew; and every step decodes the whole layer. They save memory
between steps, and a layer at full size exists during one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import QuantizedLayer

from kvgauge.attend.attention import exact_attention
from kvgauge.attend.mask import Mask
from kvgauge.errors import UserError
from kvgauge.layers.two_phase import TwoPhaseLayer
from kvgauge.store.buffers import GrowingBuffer


class TransformersQuantizedLayer(TwoPhaseLayer):
    """One layer that a quantised layer of transformers stores.

    Args:
        new_layer: makes an empty one.
    """

    def __init__(self, new_layer: Callable[[], QuantizedLayer]) -> None:
        super().__init__()
        self.new_layer = new_layer
        self.inner = new_layer()
        self._decoded: tuple[Tensor, Tensor] | None = None  # of the running forward pass

    def store(self, keys: Tensor, values: Tensor) -> None:
        self.inner.update(keys, values)

    def append(self, keys: Tensor, values: Tensor) -> None:
        self._decoded = self.inner.update(keys, values)

    def attend_compressed(self, query: Tensor, mask: Mask, scaling: float) -> Tensor:
        # An update has decoded the layer; attention that is asked for on its own decodes it again.
        keys, values = self._decoded or self.compressed_dense()
        self._decoded = None
        return exact_attention(query, keys, values, mask, scaling)

    def compress_again(self) -> None:
        """Code the waiting tokens now, as transformers does when there are enough: all are decoded and coded anew."""
        inner = self.inner
        if not inner.keys.numel():
            return
        keys, values = self.compressed_dense()
        inner._quantized_keys = inner._quantize(keys.contiguous(), axis=inner.axis_key)
        inner._quantized_values = inner._quantize(values.contiguous(), axis=inner.axis_value)
        inner.keys, inner.values = (states.new_empty(0) for states in (keys, values))
        inner._pending_beam_idx = None

    def compressed_nbytes_by_part(self) -> dict[str, int]:
        coded = live_nbytes([self.inner._quantized_keys, self.inner._quantized_values])
        residual = live_nbytes([self.inner.keys, self.inner.values])
        return {"codes": coded} | ({"residual": residual} if residual else {})

    def compressed_dense(self) -> tuple[Tensor, Tensor]:
        inner = self.inner
        keys, values = inner._apply_pending_reorder(
            inner._dequantize(inner._quantized_keys), inner._dequantize(inner._quantized_values)
        )
        if not inner.keys.numel():
            return keys, values
        return torch.cat([keys, inner.keys], dim=2), torch.cat([values, inner.values], dim=2)

    def buffers(self) -> Sequence[GrowingBuffer]:
        return ()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.compressed:
            self.inner.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._refuse_batch()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._refuse_batch()
        super().batch_select_indices(indices)

    def _refuse_batch(self) -> None:
        if self.compressed:
            raise UserError("transformers' quantised cache can be reordered, but not repeated or cut along the batch")

    def reset(self) -> None:
        super().reset()
        self.inner = self.new_layer()
        self._decoded = None


def live_nbytes(items: Iterable[object]) -> int:
    """Bytes of all tensors in nested tuples, dicts and tensor subclasses that hold others."""
    total, pending = 0, list(items)
    while pending:
        item = pending.pop()
        if isinstance(item, Tensor) and hasattr(item, "__tensor_flatten__"):
            pending.extend(getattr(item, name) for name in item.__tensor_flatten__()[0])
        elif isinstance(item, Tensor):
            total += item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, (tuple, list)):
            pending.extend(item)
    return total
