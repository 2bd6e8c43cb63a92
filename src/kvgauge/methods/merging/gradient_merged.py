"""Merged caches whose keys are weighed by squared gradients of the loss: AsymKV (arXiv 2506.05410).

Each window of the prompt is a forward pass of its own with a backward pass behind it: the next-token cross-entropy of
the window is differentiated in every key that its queries saw. `kvgauge.evaluation.decoding.prefill` lets the cache
drive these passes. Where there is no loss (a forward pass that someone else runs, decoding), keys have no gradient;
pairs of them merge by their attention, and are counted among the guarded merges.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from kvgauge.errors import UserError
from kvgauge.methods.merging.merge_entries import Entries, averaged_hessian, running_positions
from kvgauge.methods.merging.merged import MergedLayer, MergingCache


class GradientMergedLayer(MergedLayer):
    """A layer that shows its keys to autograd while a window is recorded, and merges only after the backward pass."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.recorded: Tensor | None = None  # the keys of the recorded forward pass, in its graph

    def _readable(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if not self.recording:
            return super()._readable(keys, values)
        past = len(self.keys_buffer) - keys.shape[2]
        all_keys = torch.cat([self.keys_buffer.view()[:, :, :past], keys], dim=2)
        all_values = torch.cat([self.values_buffer.view()[:, :, :past], values], dim=2)
        if not all_keys.requires_grad:
            all_keys.requires_grad_()
        self.recorded = all_keys
        return all_keys, all_values

    @property
    def recording(self) -> bool:
        cache = self.owner
        return isinstance(cache, GradientMergingCache) and cache.recording

    def end_windows(self) -> None:
        if not self.recording:
            super().end_windows()

    @torch.no_grad()
    def take_gradient(self, gradient: Tensor) -> None:
        """Average the squared gradient of the pre-RoPE keys into the Fisher diagonal.

        Args:
            gradient: (batch, num_key_value_heads, entries, head_dim), in the keys at their positions.
        """
        self.recorded = None
        cardinalities = self.cardinalities
        if cardinalities is None:
            cardinalities = torch.ones(gradient.shape[0], gradient.shape[2], dtype=torch.int32, device=gradient.device)
        # The rotation is orthogonal: a gradient turns back as a key does.
        squared = self.rotary.shift(gradient.float(), -running_positions(cardinalities)).square()
        past = self.hessian_buffer.view() if len(self.hessian_buffer) else None
        self.windows = [windows + 1 for windows in self.windows]
        windows = torch.tensor(self.windows, device=gradient.device)
        self.hessian_buffer.set(averaged_hessian(squared, past, windows))

    def _present_hessian(self, entries: Entries, merging: Tensor) -> Tensor:
        if entries.hessian is not None:
            return entries.hessian
        return torch.full_like(entries.shares, torch.nan).unsqueeze(-1)

    # -- rows apart and together ---------------------------------------------------------------------------------

    def row(self, index: int) -> GradientMergedLayer:
        """A copy of one sequence, without the empty places in front of it."""
        layer = GradientMergedLayer(self.policy, self.rotary)
        if not self.is_initialized:
            return layer
        layer.dtype, layer.device, layer.is_initialized = self.dtype, self.device, True
        layer.groups, layer.compressed = self.groups, self.compressed
        for name in ("counts", "fresh", "lags", "windows"):
            setattr(layer, name, [getattr(self, name)[index]])
        layer.limits = None if self.limits is None else [self.limits[index]]
        count = self.counts[index]
        for mine, theirs in zip(self.buffers(), layer.buffers(), strict=True):
            if len(mine) and count:
                theirs.set(mine.view()[index : index + 1, ..., len(mine) - count :, :].clone())
        return layer

    def join(self, rows: list[GradientMergedLayer]) -> None:
        """Hold the sequences of `rows`, one each, in the place of what was held."""
        first = rows[0]
        self.dtype, self.device, self.is_initialized = first.dtype, first.device, True
        self.groups = first.groups
        self._turning = None
        for name in ("counts", "fresh", "lags", "windows"):
            setattr(self, name, [getattr(row, name)[0] for row in rows])
        self.merge_count += sum(row.merge_count for row in rows)
        self.guard_count += sum(row.guard_count for row in rows)
        self.most_entries = max(self.most_entries, *(row.most_entries for row in rows))
        longest = max(self.counts)
        if any(row.counts[0] < longest or row.cardinalities is not None for row in rows):
            for row in rows:
                if row.cardinalities is None:
                    ones = torch.ones(1, row.counts[0], 1, dtype=torch.int32, device=self.device)
                    row.cardinality_buffer.set(ones)
        fills = (0.0, 0.0, 0, 0.0, torch.nan)
        for place, (mine, fill) in enumerate(zip(self.buffers(), fills, strict=True)):
            parts = [row.buffers()[place] for row in rows]
            held = [part.view() for part in parts if len(part)]
            mine.clear()
            if not held:
                continue
            like = max(held, key=lambda part: part.shape[-1])
            padded = [
                _padded_front(part.view(), longest, like.shape[-1], fill)
                if len(part)
                else like.new_full((*like.shape[:-2], longest, like.shape[-1]), fill)
                for part in parts
            ]
            mine.set(torch.cat(padded))


def _padded_front(rows: Tensor, length: int, width: int, fill: float) -> Tensor:
    """(1, …, rows, dimension) brought to `length` rows, empty ones in front, and to `width` columns."""
    rows = rows.expand(*rows.shape[:-1], width)
    return functional.pad(rows, (0, 0, length - rows.shape[-2], 0), value=fill)


class GradientMergingCache(MergingCache):
    """Drives its own prefill: forward and backward, window by window."""

    layers: list[GradientMergedLayer]

    def __init__(self, layers: list[GradientMergedLayer], *, context_length: int | None = None) -> None:
        super().__init__(layers, context_length=context_length)
        self.recording = False

    @property
    def gradient_windows(self) -> int:
        """Backward passes of the sequence that had most."""
        return max(self.layers[0].windows, default=0)

    def drive(self, model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """See `KVCache.drive`. Padded sequences go one by one: each has windows of its own.

        Raises:
            UserError: weights or surroundings that autograd cannot record.
        """
        if torch.is_inference_mode_enabled() or any(weight.is_inference() for weight in model.parameters()):
            raise UserError(
                f"{self.layers[0].policy.name} needs gradients and the weights are for inference only: "
                f"load the model and call outside torch.inference_mode(), or choose kvslimmer"
            )
        if any(layer.frozen is not None for layer in self.layers):
            return None  # nothing merges any more
        cached = self.get_seq_length()
        mask = None if mask is None else mask[:, : cached + ids.shape[1]]
        if mask is None or bool(mask.all()):
            return self._drive_together(model, ids)
        new = mask[:, cached:]
        rows = [self._row(index, mask) for index in range(ids.shape[0])]
        logits = [row._drive_together(model, ids[index : index + 1, new[index]]) for index, row in enumerate(rows)]
        self._join(rows, mask, new)
        return torch.cat(logits)

    def _drive_together(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        logits, begin = None, 0
        while begin < ids.shape[1]:
            fresh = max(self.layers[0].fresh, default=0)
            part = ids[:, begin : begin + self.layers[0].policy.window - fresh]
            logits = self._pass(model, part)
            begin += part.shape[1]
        if logits is None:
            raise ValueError("there are no tokens to prefill")
        return logits

    def _pass(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """One forward pass within a window, and a backward pass if the window will end in a merge."""
        merging = not self.layers[0].is_initialized or any(layer.merge_ahead() for layer in self.layers)
        if ids.shape[1] < 2 or not merging:
            with torch.no_grad():
                output = model(input_ids=ids, past_key_values=self, use_cache=True, logits_to_keep=1)
            return output.logits[:, -1]
        self.recording = True
        try:
            with torch.enable_grad():
                logits = model(input_ids=ids, past_key_values=self, use_cache=True).logits
                losses = functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
                )
                keys = [layer.recorded for layer in self.layers]
                gradients = torch.autograd.grad(losses / (ids.shape[1] - 1), keys)  # type: ignore[arg-type]
        finally:
            self.recording = False
        for layer, gradient in zip(self.layers, gradients, strict=True):
            layer.take_gradient(gradient)
            layer.end_windows()
        return logits[:, -1].detach()

    def _row(self, index: int, mask: Tensor) -> GradientMergingCache:
        row = GradientMergingCache([layer.row(index) for layer in self.layers])
        cached = self.get_seq_length()
        padding = int((~mask[index]).sum())
        if self.expected_padding is not None:
            padding = max(padding, self.expected_padding[index])
        row.expect(max(0, self.expected - padding))
        for layer in row.layers:
            layer.logical_length = int(mask[index, :cached].sum())
        return row

    def _join(self, rows: list[GradientMergingCache], mask: Tensor, new: Tensor) -> None:
        total = mask.shape[1]
        for index, layer in enumerate(self.layers):
            layer.join([row.layers[index] for row in rows])
            layer.logical_length = total
        self.valid = mask.clone()
        self.pads = (~mask).sum(dim=1).tolist()
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        known = self.positions
        if known is None:
            self.positions = positions[:, total - new.shape[1] :]
        else:
            self.positions = torch.cat([known.expand(mask.shape[0], -1), positions[:, -new.shape[1] :]], dim=1)
        self.layer_done(len(self.layers) - 1)
