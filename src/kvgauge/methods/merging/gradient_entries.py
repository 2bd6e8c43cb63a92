"""Entries whose keys are weighed by gradients: autograd sees them while a window is recorded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvgauge.methods.merging.merge_entries import Entries, averaged_hessian, running_positions
from kvgauge.methods.merging.merging_entries import MergingEntries
from kvgauge.methods.merging.policy import MergePolicy
from kvgauge.methods.merging.positions import RunningPositions
from kvgauge.methods.merging.tally import Tally
from kvgauge.methods.merging.windows import Windows


class GradientEntries(MergingEntries):
    """Entries that merge only after the backward pass of a recorded window; arguments as in `MergingEntries`.

    Attributes:
        recording: a forward pass is being recorded.
        recorded: the keys and values that its queries saw, in its graph.
    """

    def __init__(self, policy: MergePolicy, windows: Windows, positions: RunningPositions, tally: Tally) -> None:
        super().__init__(policy, windows, positions, tally)
        self.recording = False
        self.recorded: tuple[Tensor, Tensor] | None = None

    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        super().append(keys, values, valid)
        if self.recording:
            past = len(self.held) - keys.shape[2]
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
        """Average the squared gradient of the pre-RoPE keys into the Fisher diagonal.

        Args:
            gradient: (batch, num_key_value_heads, entries, head_dim), in the keys at their positions.
        """
        cardinalities = self.held.cardinalities
        if cardinalities is None:
            cardinalities = torch.ones(gradient.shape[0], gradient.shape[2], dtype=torch.int32, device=gradient.device)
        # The rotation is orthogonal: a gradient turns back as a key does.
        squared = self.positions.rotary.shift(gradient.float(), -running_positions(cardinalities)).square()
        self.windows.take([True] * len(self.windows.taken))
        windows = torch.tensor(self.windows.taken, device=gradient.device)
        self.held.hessian.set(averaged_hessian(squared, self.held.past_hessian(), windows))

    def present_hessian(self, entries: Entries, merging: Sequence[bool]) -> Tensor:
        if entries.hessian is not None:
            return entries.hessian
        return torch.full_like(entries.shares, torch.nan).unsqueeze(-1)
