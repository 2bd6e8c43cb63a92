"""Entries whose keys are weighed by gradients: autograd sees them while a window is recorded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kvgauge.attend.counted_attention import counted_attention
from kvgauge.methods.merging.merge_entries import Entries, averaged_hessian, running_positions
from kvgauge.methods.merging.merging_entries import MergingEntries
from kvgauge.methods.merging.policy import MergePolicy
from kvgauge.methods.merging.positions import NewTokens, RunningPositions
from kvgauge.methods.merging.tally import Tally
from kvgauge.methods.merging.windows import Windows


class GradientEntries(MergingEntries):
    """Entries that merge only after the backward pass of a recorded window; arguments as in `MergingEntries`.

    Attributes:
        recording: a forward pass is being recorded.
        recorded: the keys and values that its queries saw, in its graph.
        probing: the pass being recorded is for its gradients alone, and leaves nothing behind.
        asked: the mean attention that its queries paid to what was there before, once they have.
    """

    def __init__(self, policy: MergePolicy, windows: Windows, positions: RunningPositions, tally: Tally) -> None:
        super().__init__(policy, windows, positions, tally)
        self.recording = False
        self.recorded: tuple[Tensor, Tensor] | None = None
        self.probing = False
        self.asked: Tensor | None = None

    def look_ahead(self, query: Tensor, keys: Tensor, new: NewTokens, scaling: float) -> None:
        if not self.probing:
            super().look_ahead(query, keys, new, scaling)

    def window_end(self, begin: int, queries: int, valid: Tensor | None) -> int:
        return queries if self.probing else super().window_end(begin, queries, valid)

    def attend(self, query: Tensor, scaling: float, valid: Tensor | None = None) -> Tensor:
        if not self.probing:
            return super().attend(query, scaling, valid)
        keys, values = self.readable()
        past, self.groups = len(self.held), query.shape[1] // keys.shape[1]
        counts = self.held.cardinalities
        counts = None if counts is None else functional.pad(counts, (0, keys.shape[2] - past), value=1)
        output, sums = counted_attention(query, keys, values, counts, scaling)
        self.asked = sums[..., :past] / (query.shape[2] * self.groups)
        return output

    def merge_asked(self) -> None:
        """A new window begins: merge what was there before by the attention of the pass that was recorded."""
        assert self.asked is not None
        rows = [True] * len(self.windows.counts)
        self.held.attention.set(self.asked[..., None])
        self._merge(self.windows.surplus(rows), rows, self.held.read([0.0] * len(rows), self.groups))
        self.held.attention.clear()
        self.windows.restart(rows)
        self.asked = None

    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        if not self.probing:
            super().append(keys, values, valid)
        if self.recording:
            past = len(self.held) - (0 if self.probing else keys.shape[2])
            all_keys = torch.cat([self.held.keys.view()[:, :, :past], keys], dim=2)
            all_values = torch.cat([self.held.values.view()[:, :, :past], values], dim=2)
            if not all_keys.requires_grad:
                all_keys.requires_grad_()
            self.recorded = (all_keys, all_values)

    def readable(self) -> tuple[Tensor, Tensor]:
        return super().readable() if self.recorded is None else self.recorded

    def end_windows(self) -> None:
        if not self.recording:
            super().end_windows()

    @torch.no_grad()
    def take_gradient(self, gradient: Tensor) -> None:
        """Average the gradient of the pre-RoPE keys, or its square, into what earlier windows left.

        Args:
            gradient: (batch, num_key_value_heads, entries, head_dim), in the keys at their positions; of a pass that
                probes, only what was there before counts.
        """
        gradient = gradient[:, :, : len(self.held)]
        cardinalities = self.held.cardinalities
        if cardinalities is None:
            cardinalities = torch.ones(gradient.shape[0], gradient.shape[2], dtype=torch.int32, device=gradient.device)
        # The rotation is orthogonal: a gradient turns back as a key does.
        places = running_positions(cardinalities, at_end=self.held.at_end)
        plain = self.positions.rotary.shift(gradient.float(), -places)
        signed = self.policy.rule == "gradient"
        before = None if signed and not self.tally.merges else self.held.past_hessian()
        self.windows.take([True] * len(self.windows.taken))
        windows = torch.tensor(self.windows.taken, device=gradient.device)
        self.held.hessian.set(averaged_hessian(plain if signed else plain.square(), before, windows))

    def present_hessian(self, entries: Entries, merging: Sequence[bool]) -> Tensor:
        if entries.hessian is not None:
            return entries.hessian
        return torch.full_like(entries.shares, torch.nan).unsqueeze(-1)
