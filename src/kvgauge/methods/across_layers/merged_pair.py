"""MiniCache's storage: two layers share the directions of their keys and values, each keeps its own lengths.

Tokens whose directions differ most between the two layers are kept exactly beside the shared ones. Nothing is rebuilt
to attend: a score is the one with the direction times the length, a retained token's score replaces it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvgauge.layers.home import shared_home
from kvgauge.layers.tail import TailedLayer
from kvgauge.store.buffers import GrowingBuffer
from kvgauge.store.rows import RowBuffer

RetainedCount = Callable[[int], int]  # tokens of a sequence → tokens of a pair of layers that stay exact


@dataclass(frozen=True)
class MergeRule:
    """How two layers become one.

    Attributes:
        interpolation: t of the spherical interpolation, 0 the first layer's direction, 1 the second's.
        gamma: tokens are kept exactly from the distance ``d_min + γ (d_max − d_min)`` up.
        retained: how many tokens are kept, instead of `gamma`; None: `gamma` decides.
    """

    interpolation: float
    gamma: float
    retained: RetainedCount | None = None

    def keeps(self, distance: Tensor, before: int = 0) -> Tensor:
        """True for tokens of one sequence that stay exact, from their distances (tokens,), behind `before` others."""
        if not distance.numel():
            return torch.zeros_like(distance, dtype=torch.bool)
        if self.retained is None:
            return distance >= distance.min() + self.gamma * (distance.max() - distance.min())
        wanted = self.retained(before + distance.numel()) - (self.retained(before) if before else 0)
        count = max(0, min(wanted, distance.numel()))
        return torch.zeros_like(distance, dtype=torch.bool).index_fill_(0, distance.topk(count).indices, True)


def angle(first: Tensor, second: Tensor) -> Tensor:
    """Angles between unit vectors (…, head_dim), in radians; stable near 0 and π, where arccos is not."""
    return 2 * torch.atan2((first - second).norm(dim=-1), (first + second).norm(dim=-1))


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Spherical interpolation of unit vectors (…, head_dim): ``(sin((1−t)Ω) u + sin(tΩ) v) / sin Ω``, of unit length.

    Where Ω is 0 or π the great circle is not unique and the straight line between both is taken.
    """
    omega = angle(first, second).unsqueeze(-1)
    sine = omega.sin()
    straight = sine.abs() < 1e-6
    divisor = torch.where(straight, torch.ones_like(sine), sine)
    left = torch.where(straight, torch.full_like(omega, 1 - share), ((1 - share) * omega).sin() / divisor)
    right = torch.where(straight, torch.full_like(omega, share), (share * omega).sin() / divisor)
    return torch.nn.functional.normalize(left * first + right * second, dim=-1)


class MergedStates:
    """Keys, or values, of two layers: shared directions, lengths and retained tokens per layer."""

    def __init__(self) -> None:
        self.directions = GrowingBuffer()  # (batch, heads, tokens, head_dim)
        self.lengths = (GrowingBuffer(), GrowingBuffer())  # (batch, heads, tokens, 1)
        self.columns = GrowingBuffer()  # (batch, retained, 1): which tokens stay exact
        self.retained = (GrowingBuffer(), GrowingBuffer())  # (batch, heads, retained, head_dim)

    def merge(self, first: Tensor, second: Tensor, valid: Tensor | None, rule: MergeRule) -> None:
        """Take in states of both layers, (batch, heads, tokens, head_dim), behind those that are there.

        Args:
            first, second: of each layer.
            valid: (batch, tokens) of all tokens, False on padding; None where there is none.
            rule: how they are merged.
        """
        dtype = first.dtype
        pair = (first.float(), second.float()) if dtype.itemsize < 4 else (first, second)
        units = tuple(torch.nn.functional.normalize(states, dim=-1) for states in pair)
        directions = slerp(units[0], units[1], rule.interpolation)
        distance = angle(units[0], units[1]).mean(dim=1) / torch.pi  # (batch, tokens)
        batch, tokens = distance.shape
        begin = len(self.directions)
        every = distance.new_ones(batch, begin + tokens, dtype=torch.bool) if valid is None else valid
        seen, before = every[:, begin : begin + tokens], every[:, :begin].sum(dim=1).tolist()
        kept = torch.zeros_like(seen)
        for row, mask, where, count in zip(distance, seen, kept, before, strict=True):
            where[mask] = rule.keeps(row[mask], count)
        # Sequences that retain fewer tokens than others fill up with merged ones, which changes nothing for them.
        most = int(kept.sum(dim=1).max())
        order = (distance + 2.0 * kept + 1.0 * seen).argsort(dim=1, descending=True)[:, :most]
        add = GrowingBuffer.append if begin else GrowingBuffer.set
        picked = order[:, None, :, None].expand(-1, first.shape[1], -1, first.shape[3])
        exact = kept.gather(1, order)[:, None, :, None]
        add(self.directions, directions.to(dtype))
        add(self.columns, begin + order.unsqueeze(-1).int())
        for layer, states in enumerate(pair):
            length = states.norm(dim=-1, keepdim=True)
            add(self.lengths[layer], length.to(dtype))
            merged = (directions * length).gather(2, picked)
            add(self.retained[layer], torch.where(exact, states.gather(2, picked), merged).to(dtype))

    def picked(self, like: Tensor) -> Tensor:
        """The retained columns, expanded to index the last dimension of `like` (batch, heads, rows, tokens)."""
        return self.columns.view()[:, None, None, :, 0].long().expand(-1, like.shape[1], like.shape[2], -1)

    def dense(self, layer: int) -> Tensor:
        """What is stored for one layer, (batch, heads, tokens, head_dim)."""
        states = self.directions.view() * self.lengths[layer].view()
        index = self.columns.view()[:, None].long().expand(-1, states.shape[1], -1, states.shape[3])
        return states.scatter(2, index, self.retained[layer].view())

    def trim(self) -> None:
        """Give back spare capacity."""
        for buffer in (*self.shared_buffers(), *self.own_buffers(0), *self.own_buffers(1)):
            buffer.trim()

    def shared_buffers(self) -> list[GrowingBuffer]:
        return [self.directions, self.columns]

    def own_buffers(self, layer: int) -> list[GrowingBuffer]:
        return [self.lengths[layer], self.retained[layer]]


class MergedSegment:
    """One layer of a merged pair as a segment of attention."""

    def __init__(self, keys: MergedStates, values: MergedStates, layer: int) -> None:
        self.keys, self.values, self.layer = keys, values, layer
        self.num_key_value_heads = keys.directions.view().shape[1]

    def __len__(self) -> int:
        return len(self.keys.directions)

    def scores(self, query: Tensor) -> Tensor:
        """See `kvgauge.attend.attention.Segment`."""
        lengths = self.keys.lengths[self.layer].view().transpose(-1, -2)
        scores = (query @ self.keys.directions.view().transpose(-1, -2)).mul_(lengths)
        exact = query @ self.keys.retained[self.layer].view().transpose(-1, -2)
        return scores.scatter_(3, self.keys.picked(scores), exact)

    def mix(self, weights: Tensor) -> Tensor:
        """See `kvgauge.attend.attention.Segment`."""
        picked = self.values.picked(weights)
        exact = weights.gather(3, picked) @ self.values.retained[self.layer].view()
        lengths = self.values.lengths[self.layer].view().transpose(-1, -2)
        return exact + (weights.scatter(3, picked, 0.0) * lengths) @ self.values.directions.view()


class MergedPair:
    """Two layers that share directions.

    Args:
        rule: how they are merged.
    """

    def __init__(self, rule: MergeRule) -> None:
        self.rule = rule
        self.keys, self.values = MergedStates(), MergedStates()
        self.members = [MergedPairLayer(self, member) for member in range(2)]
        self._waiting: tuple[Tensor, Tensor] | None = None

    def collect(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        """Take the exact keys and values of the next layer; the second one starts the merge."""
        if self._waiting is None:
            self._waiting = (keys, values)
            return
        (first_keys, first_values), self._waiting = self._waiting, None
        self.keys.merge(first_keys, keys, valid, self.rule)
        self.values.merge(first_values, values, valid, self.rule)

    def absorb(self) -> None:
        """Merge the whole tail."""
        one, two = self.members
        waiting = len(one.tail_keys)
        if not waiting:
            return
        tails = ((self.keys, one.tail_keys, two.tail_keys), (self.values, one.tail_values, two.tail_values))
        for states, first, second in tails:
            states.merge(first.drop_front(waiting), second.drop_front(waiting), one.valid, self.rule)
            states.trim()


class MergedPairLayer(TailedLayer):
    """One layer of a pair; the first one counts what both share as its own."""

    def __init__(self, pair: MergedPair, member: int) -> None:
        super().__init__()
        self.pair, self.member = pair, member

    @property
    def home(self) -> torch.device:
        return shared_home(self.pair.members)

    def store(self, keys: Tensor, values: Tensor) -> None:
        self.pair.collect(keys, values, self.valid)

    def context_segment(self) -> MergedSegment:
        return MergedSegment(self.pair.keys, self.pair.values, self.member)

    def context_dense(self) -> tuple[Tensor, Tensor]:
        return self.pair.keys.dense(self.member), self.pair.values.dense(self.member)

    def compress_again(self) -> None:
        if self.member == 0:
            self.pair.absorb()
        for buffer in (self.tail_keys, self.tail_values):
            buffer.trim()

    def compressed_nbytes_by_part(self) -> dict[str, int]:
        states = (self.pair.keys, self.pair.values)
        shared = self.member == 0
        parts = {
            "directions": sum(part.directions.nbytes() for part in states) if shared else 0,
            "lengths": sum(part.lengths[self.member].nbytes() for part in states),
            "retained": sum(part.retained[self.member].nbytes() for part in states),
            "columns": sum(part.columns.nbytes() for part in states) if shared else 0,
            "tail": self.tail_nbytes(),
        }
        return {part: size for part, size in parts.items() if size}

    def read_nbytes(self) -> int:
        shared = (part for states in (self.pair.keys, self.pair.values) for part in (states.directions, states.columns))
        return super().read_nbytes() + (sum(part.nbytes() for part in shared) if self.member else 0)

    def buffers(self) -> Sequence[RowBuffer]:
        own = list(super().buffers())
        for states in (self.pair.keys, self.pair.values):
            own += states.own_buffers(self.member)
            if self.member == 0:
                own += states.shared_buffers()
        return own

    def crop_compressed(self, tokens: int) -> None:
        kept = tokens - len(self.pair.keys.directions)
        if kept < 0:
            super().crop_compressed(tokens)
        self.tail_keys.crop(kept)
        self.tail_values.crop(kept)
