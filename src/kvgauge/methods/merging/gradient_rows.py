"""Padded batches whose rows have windows of their own: rows taken apart, and put together again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kvgauge.methods.merging.entry_buffers import EntryBuffers
from kvgauge.methods.merging.gradient_entries import GradientEntries
from kvgauge.store.buffers import GrowingBuffer


def hold_row(entries: GradientEntries, source: GradientEntries, index: int) -> None:
    """Be a copy of one row of `source`, without the empty places in front of it."""
    entries.groups = source.groups
    entries.windows.hold_row(source.windows, index)
    entries.positions.begin([source.positions.lags[index]])
    count = entries.windows.counts[0]
    for theirs, mine in zip(source.held.all(), entries.held.all(), strict=True):
        if len(theirs) and count:
            mine.set(theirs.view()[index : index + 1, ..., len(theirs) - count :, :].clone())


def hold_rows(entries: GradientEntries, rows: Sequence[GradientEntries]) -> None:
    """Be `rows`, of one row each, in the place of what was held; what happened to them happened here."""
    entries.groups = rows[0].groups
    entries.windows.hold_rows([row.windows for row in rows])
    entries.positions.begin([row.positions.lags[0] for row in rows])
    for row in rows:
        entries.tally.add(row.tally)
    longest = max(entries.windows.counts)
    if any(len(row.held) < longest or row.held.cardinalities is not None for row in rows):
        for row in rows:
            _spell_out(row.held)
    fills = (0.0, 0.0, 0, 0.0, torch.nan)
    for mine, fill, *parts in zip(entries.held.all(), fills, *(row.held.all() for row in rows), strict=True):
        _join(mine, parts, longest, fill)


def _spell_out(held: EntryBuffers) -> None:
    """Cardinalities even where all are 1: those of other rows are not."""
    if held.cardinalities is None:
        held.counts.set(torch.ones(1, len(held), 1, dtype=torch.int32, device=held.keys.view().device))


def _join(whole: GrowingBuffer, parts: Sequence[GrowingBuffer], length: int, fill: float) -> None:
    held = [part.view() for part in parts if len(part)]
    whole.clear()
    if not held:
        return
    like = max(held, key=lambda part: part.shape[-1])
    padded = [
        _padded_front(part.view(), length, like.shape[-1], fill)
        if len(part)
        else like.new_full((*like.shape[:-2], length, like.shape[-1]), fill)
        for part in parts
    ]
    whole.set(torch.cat(padded))


def _padded_front(rows: Tensor, length: int, width: int, fill: float) -> Tensor:
    """(1, …, rows, dimension) brought to `length` rows, empty ones in front, and to `width` columns."""
    rows = rows.expand(*rows.shape[:-1], width)
    return functional.pad(rows, (0, 0, length - rows.shape[-2], 0), value=fill)
