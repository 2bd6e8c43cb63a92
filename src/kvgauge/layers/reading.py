"""What stands between an attention module and a layer of ours where the two do not speak of the same heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from kvgauge.architecture.head_frame import HeadFrame
from kvgauge.attend.attention import ServesModules
from kvgauge.attend.mask import Mask

if TYPE_CHECKING:
    from kvgauge.layers.cache import LayerCache


class Reading(ServesModules):
    """A layer's cache in one forward pass: brings queries into its frame, and serves other layers that read it too.

    Args:
        layer: that attends.
        place: the index of its attention module in the model.
        frame: of its keys and queries; None: the model's own.
    """

    def __init__(self, layer: LayerCache, place: int, frame: HeadFrame | None) -> None:
        self.layer, self.place, self.frame = layer, place, frame

    def attend(self, query: Tensor, *, mask: Mask, scaling: float, position_ids: Tensor | None) -> Tensor:
        """See `kvgauge.attend.attention.Attendable`."""
        return self.layer.attend(self._framed(query), mask=mask, scaling=scaling, position_ids=position_ids)

    def for_module(self, module: nn.Module) -> Reading | SharedReading:
        """What attends for `module`: this, or what serves a layer that reads the cache of another one."""
        place = getattr(module, "layer_idx", self.place)
        return self if place == self.place else SharedReading(self, place)

    def _framed(self, query: Tensor) -> Tensor:
        return query if self.frame is None else self.frame.queries(query)


class SharedReading:
    """The same for another layer of the model.

    Args:
        reading: of the layer whose cache it is.
        place: of the module that reads it.
    """

    def __init__(self, reading: Reading, place: int) -> None:
        self.reading, self.place = reading, place

    def attend(self, query: Tensor, *, mask: Mask, scaling: float, position_ids: Tensor | None) -> Tensor:
        """See `kvgauge.attend.attention.Attendable`."""
        layer = self.reading.layer
        output = layer.attend_again(self.reading._framed(query), mask, scaling)
        assert layer.cache is not None
        layer.cache.reader_done(self.place)
        return output
