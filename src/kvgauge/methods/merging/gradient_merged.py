"""Merged caches whose keys are weighed by squared gradients of the loss: AsymKV (arXiv 2506.05410).

Each window of the prompt is a forward pass of its own with a backward pass behind it: the next-token cross-entropy of
the window is differentiated in every key that its queries saw. `kvgauge.evaluation.decoding.prefill` lets the cache
drive these passes. Where the next window decides, a window is read twice: for its gradients, and to be kept.

Where there is no loss (a forward pass that someone else runs, decoding), keys have no gradient; pairs of them merge by
their attention, and are counted among the guarded merges.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from kvgauge.errors import UserError
from kvgauge.layers import others
from kvgauge.methods.merging.gradient_entries import GradientEntries
from kvgauge.methods.merging.gradient_rows import hold_row, hold_rows
from kvgauge.methods.merging.merged import MergedLayer
from kvgauge.methods.merging.merging_cache import MergingCache
from kvgauge.methods.merging.merging_entries import MergingEntries


class GradientMergedLayer(MergedLayer):
    """A layer that shows its keys to autograd while a window is recorded."""

    entries_type: ClassVar[type[MergingEntries]] = GradientEntries

    @property
    def merging(self) -> GradientEntries:
        """The entries, as long as they merge."""
        assert isinstance(self.entries, GradientEntries)
        return self.entries

    def row(self, index: int) -> GradientMergedLayer:
        """A copy of one sequence."""
        layer = GradientMergedLayer(self.policy, self.rotary)
        if self.is_initialized:
            layer.dtype, layer.device, layer.is_initialized = self.dtype, self.device, True
            layer.compressed = self.compressed
            hold_row(layer.merging, self.merging, index)
        return layer

    def join(self, rows: list[GradientMergedLayer]) -> None:
        """Hold the sequences of `rows`, one each, in the place of what was held."""
        self.dtype, self.device, self.is_initialized = rows[0].dtype, rows[0].device, True
        hold_rows(self.merging, [row.merging for row in rows])


class GradientMergingCache(MergingCache):
    """Drives its own prefill: forward and backward, window by window."""

    own: list[GradientMergedLayer]

    def __init__(self, layers: list[GradientMergedLayer], *, context_length: int | None = None) -> None:
        super().__init__(layers, context_length=context_length)
        self.recording = False

    @property
    def gradient_windows(self) -> int:
        """Backward passes of the sequence that had most."""
        return max(self.own[0].windows.taken, default=0)

    def drive(self, model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """See `KVCache.drive`. Padded sequences go one by one: each has windows of its own.

        Raises:
            UserError: weights, surroundings or layers that autograd cannot record, or padding before layers that are
                left to transformers: what those hold of a row cannot be told from its padding.
        """
        name = self.own[0].policy.name
        if torch.is_inference_mode_enabled() or any(weight.is_inference() for weight in model.parameters()):
            raise UserError(
                f"{name} needs gradients and the weights are for inference only: "
                f"load the model and call outside torch.inference_mode(), or choose kvslimmer"
            )
        if not all(map(others.recordable, self.others())):
            raise UserError(
                f"{name} needs gradients, and this model has states of linear attention, which are written in place: "
                f"choose kvslimmer"
            )
        if self.compressed and self.own[0].freeze is not None:
            return None  # nothing merges any more
        cached = self.get_seq_length()
        mask = None if mask is None else mask[:, : cached + ids.shape[1]]
        if mask is None or bool(mask.all()):
            return self._drive_together(model, ids)
        if self.others():
            raise UserError(
                f"{name} reads the sequences of a padded batch one by one, and this model has windows, "
                f"which read them together: use batch_size=1"
            )
        new = mask[:, cached:]
        rows = [self._row(index, mask) for index in range(ids.shape[0])]
        logits = [row._drive_together(model, ids[index : index + 1, new[index]]) for index, row in enumerate(rows)]
        self._join(rows, mask, new)
        return torch.cat(logits)

    def _drive_together(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        logits, begin = None, 0
        while begin < ids.shape[1]:
            policy, fresh = self.own[0].policy, max(self.own[0].windows.fresh, default=0)
            if policy.ahead and fresh >= policy.window:
                self._probe(model, ids[:, begin : begin + policy.window])
                fresh = 0
            part = ids[:, begin : begin + self.own[0].windows.window - fresh]
            logits = self._pass(model, part)
            begin += part.shape[1]
        if logits is None:
            raise ValueError("there are no tokens to prefill")
        return logits

    def _pass(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """One forward pass within a window, and a backward pass if the window will end in a merge."""
        merging = not self.own[0].is_initialized or any(layer.entries.merges_ahead() for layer in self.own)
        if ids.shape[1] < 2 or not merging or self.own[0].policy.ahead:
            with torch.no_grad():
                output = model(input_ids=ids, past_key_values=self, use_cache=True, logits_to_keep=1)
            return output.logits[:, -1]
        logits, gradients = self._differentiated(model, ids)
        for layer, gradient in zip(self.own, gradients, strict=True):
            layer.merging.take_gradient(gradient)
            layer.merging.end_windows()
        for layer in self.others():
            others.detach(layer)
        self.layer_done(len(self.own) - 1)
        return logits[:, -1].detach()

    def _differentiated(self, model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A recorded pass: its logits, and the gradient of its loss in the keys of every layer."""
        entries = [layer.merging for layer in self.own]
        with self._recorded(entries), torch.enable_grad():
            logits = model(input_ids=ids, past_key_values=self, use_cache=True).logits
            losses = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
            )
            keys = [own.recorded[0] for own in entries if own.recorded is not None]
            return logits, torch.autograd.grad(losses / max(1, ids.shape[1] - 1), keys)

    def _probe(self, model: PreTrainedModel, ids: Tensor) -> None:
        """Read a window for its loss and its attention, merge what was there before, and forget the window."""
        if self.others():
            raise UserError(
                f"{self.own[0].policy.name} with decided_by: next reads every window twice, and this model has layers "
                f"that are left to transformers, which cannot forget one: use decided_by: own"
            )
        positions = self.positions
        for layer in self.own:
            layer.merging.probing = True
        try:
            _, gradients = self._differentiated(model, ids)
        finally:
            self.positions = positions
            for layer in self.own:
                layer.merging.probing = False
                layer.logical_length -= ids.shape[1]
        for layer, gradient in zip(self.own, gradients, strict=True):
            layer.merging.take_gradient(gradient)
            layer.merging.merge_asked()

    @contextmanager
    def _recorded(self, entries: list[GradientEntries]) -> Iterator[None]:
        """What the queries of a forward pass see is in its graph, and stays as it is until the pass is over."""

        def switch(on: bool) -> None:
            self.recording = on
            for own in entries:
                own.recording, own.recorded = on, None

        switch(True)
        try:
            yield
        finally:
            switch(False)

    def layer_done(self, index: int) -> None:
        if not self.recording:  # a recorded pass has not ended before its gradients are taken
            super().layer_done(index)

    def _row(self, index: int, mask: Tensor) -> GradientMergingCache:
        row = GradientMergingCache([layer.row(index) for layer in self.own])
        if self.placement is not None:
            row.place(self.placement)
        cached = self.get_seq_length()
        padding = int((~mask[index]).sum())
        if self.expected_padding is not None:
            padding = max(padding, self.expected_padding[index])
        row.expect(max(0, self.expected - padding))
        for layer in row.own:
            layer.logical_length = int(mask[index, :cached].sum())
        return row

    def _join(self, rows: list[GradientMergingCache], mask: Tensor, new: Tensor) -> None:
        total = mask.shape[1]
        for index, layer in enumerate(self.own):
            layer.join([row.own[index] for row in rows])
            layer.logical_length = total
        self.valid = mask.clone()
        self.pads = (~mask).sum(dim=1).tolist()
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        known = self.positions
        if known is None:
            self.positions = positions[:, total - new.shape[1] :]
        else:
            self.positions = torch.cat([known.expand(mask.shape[0], -1), positions[:, -new.shape[1] :]], dim=1)
        self.layer_done(len(self.own) - 1)
