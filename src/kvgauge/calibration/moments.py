"""Second moments of keys, queries and values: all that the closed forms need, in memory that no corpus can grow.

A few of the sequences that they were taken of stay with them, for methods whose fit needs more than second moments.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.artifacts import read_tensors, write_tensors
from kvgauge.errors import UserError
from kvgauge.models.identity import model_fingerprint

NAMES = ("k_post", "k_pre", "q_post", "q_pre", "v")
SEQUENCE_TOKENS = 32_768  # of the sequences that are kept: 16 of 2,048, an eighth of a megabyte
_SEQUENCE = "sequence_"
HELD_OUT = "held_out"


@dataclass(frozen=True)
class Moments:
    """Sums over tokens of outer products, per layer and kv-head; additive over tokens, batches and shards.

    Attributes:
        tensors: ``k_post``, ``k_pre``, ``q_post``, ``q_pre`` and ``v``, each (layers, num_key_value_heads, head_dim,
            head_dim), float64; the queries of a group are stacked, so ``q_*`` sums over the group's heads too.
        metadata: ``model`` and ``model_name``, ``tokens`` counted, ``sequence_length`` of the longest sequence,
            ``scalings`` of the layers' scores, and what the caller adds, e.g. the corpus.
        sequences: the first calibration sequences, token ids (tokens,), at most `SEQUENCE_TOKENS` tokens in all.
        held_out: token ids (sequences, tokens) that no moment counts, for what is measured on the model itself; None
            where there are none.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    sequences: tuple[Tensor, ...] = ()
    held_out: Tensor | None = None

    @property
    def num_layers(self) -> int:
        return int(self.tensors["v"].shape[0])

    @property
    def tokens(self) -> int:
        return int(self.metadata["tokens"])

    @property
    def sequence_length(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.metadata["sequence_length"])

    def keys(self, rope: str) -> Tensor:
        """C_K, ``post`` or ``pre`` RoPE.

        Raises:
            UserError: keys of the model could not be turned back.
        """
        return self._known(f"k_{rope}")

    def queries(self, rope: str) -> Tensor:
        """C_Q, ``post`` or ``pre`` RoPE, stacked over the heads of a group; errors as `keys`."""
        return self._known(f"q_{rope}")

    def _known(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise UserError(
                f"there are no moments {name} of {self.metadata.get('model_name', 'this model')}: its rotary embedding "
                f"cannot be undone, use rope: post"
            )
        return self.tensors[name]

    def values(self) -> Tensor:
        """C_V."""
        return self.tensors["v"]

    def scalings(self) -> Tensor:
        """What every layer multiplies the products of these queries and keys with, (layers,), float64."""
        return torch.tensor(self.metadata["scalings"], dtype=torch.float64)

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets of tokens, with the held-out sequences of the first that has some.

        Raises:
            UserError: they belong to different models.
        """
        if self.metadata.get("model") != other.metadata.get("model"):
            raise UserError("moments of different models cannot be added: collect both with one model")
        tensors = {name: tensor + other.tensors[name] for name, tensor in self.tensors.items()}
        counted = {
            "tokens": self.tokens + other.tokens,
            "sequence_length": max(self.sequence_length, other.sequence_length),
        }
        held_out = other.held_out if self.held_out is None else self.held_out
        sequences = first_sequences((*self.sequences, *other.sequences))
        return Moments(tensors, self.metadata | counted, sequences, held_out)

    def check(self, model: PreTrainedModel) -> None:
        """Refuse moments that cannot be used with `model`.

        Raises:
            UserError: another model's, or values that are not finite.
        """
        if self.metadata.get("model") != model_fingerprint(model):
            raise UserError(
                f"the moments were collected with another model ({self.metadata.get('model_name', 'unknown')}): "
                f"run collect with this one"
            )
        for name, tensor in self.tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(f"the moments {name} hold values that are not finite: collect again in float32")

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        more = {f"{_SEQUENCE}{index:04d}": ids for index, ids in enumerate(self.sequences)}
        if self.held_out is not None:
            more[HELD_OUT] = self.held_out
        write_tensors(path, self.tensors | more, self.metadata)

    @classmethod
    def load(cls, path: Path) -> Moments:
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing or damaged.
        """
        tensors, metadata = read_tensors(path)
        sequences = tuple(tensors.pop(name) for name in sorted(tensors) if name.startswith(_SEQUENCE))
        held_out = tensors.pop(HELD_OUT, None)
        return cls(tensors, metadata, sequences, held_out)


def first_sequences(sequences: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """As many of the first `sequences`, each (tokens,), as `SEQUENCE_TOKENS` allows, and one in any case."""
    kept: list[Tensor] = []
    left = SEQUENCE_TOKENS
    for ids in sequences:
        if kept and ids.numel() > left:
            break
        kept.append(ids[:SEQUENCE_TOKENS])
        left -= ids.numel()
    return tuple(kept)
