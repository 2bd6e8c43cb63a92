"""KVQuant (arXiv 2401.18079): keys per channel before the rotation, non-uniform levels, outliers and sinks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from kvgauge.architecture.facts import attention_device, model_facts
from kvgauge.architecture.frequencies import layer_plane_rotations
from kvgauge.architecture.planes import PlaneRotation
from kvgauge.architecture.prompt_length import prompt_length
from kvgauge.contract.budget import allowed_nbytes, most, reference_nbytes
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.fitting import check_fitted, fit_metadata
from kvgauge.contract.method import Method, Needs, plain_label
from kvgauge.contract.roles import Lossless, Quantizer
from kvgauge.errors import UserError
from kvgauge.layers.building import placed
from kvgauge.layers.cache import KVCache
from kvgauge.methods.kvquant.fit import calibration_samples, fit_layers
from kvgauge.methods.kvquant.grid import ChannelGrid, TokenGrid
from kvgauge.methods.kvquant.layer import EXACT_BITS, KVQuantCache, KVQuantLayer, LayerQuantiser
from kvgauge.methods.kvquant.rows import coded_nbytes
from kvgauge.store.bit_packing import packed_size

if TYPE_CHECKING:
    from kvgauge.architecture.facts import ModelFacts
    from kvgauge.calibration.moments import Moments

BITS = (2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class KVQuant(Quantizer, Lossless, Method):
    """Packed codes of non-uniform levels.

    Keys are measured per channel, by thresholds learnt offline; values per token, by thresholds found as the token
    comes. New tokens are coded as they come. One fit serves every number of bits.

    The paper's parts can be switched off one by one: ``pre_rope: false``, ``nuq: false`` (evenly spaced levels),
    ``outliers: 0``, ``sinks: 0``. Its Q-Norm (levels moved to the mean and deviation of the samples, for 2 bits) is
    left out.

    Attributes:
        bits: of a code: 2, 3 or 4; 16 keeps numbers as they are, to check everything around them. It overrides the
            budget, which takes the most bits whose bytes fit.
        pre_rope: code keys before the rotation, and rotate them at every step.
        nuq: levels from sensitivity-weighted k-means.
        outliers: share of the entries kept exactly in 16 bits, half of them at each end. Of a token's values whole
            entries at each end are kept, none where the share of a row rounds to none.
        sinks: first tokens that stay exact.
        fit_tokens: calibration tokens that are run forwards and backwards.

    Raises:
        UserError: values out of range.
    """

    name: str = "kvquant"
    bits: int | None = None
    pre_rope: bool = True
    nuq: bool = True
    outliers: float = 0.01
    sinks: int = 1
    fit_tokens: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits is None and self.budget is None:
            raise UserError(f"{self.name} needs a budget, or bits: 2, 3 or 4")
        if self.bits not in (None, *BITS, EXACT_BITS):
            raise UserError(f"bits {self.bits} of {self.name}: give 2, 3 or 4 (16 switches the quantiser off)")
        if not 0.0 <= self.outliers < 0.1:
            raise UserError(f"outliers {self.outliers:g} of {self.name} is outside [0, 0.1): the paper's is 0.01")
        if self.sinks < 0:
            raise UserError(f"sinks {self.sinks} of {self.name} is a number of tokens, 0 or more")
        if self.fit_tokens < 2:
            raise UserError(f"fit_tokens {self.fit_tokens} of {self.name} is below 2: a loss needs two tokens")

    @property
    def needs(self) -> Needs:
        names = ("pre_rope", "outliers", "sinks", "fit_tokens")
        return Needs(learns={name: getattr(self, name) for name in names}, reference_bits=16)

    @property
    def bit_choices(self) -> tuple[int, ...]:
        return BITS

    @property
    def label(self) -> str:
        return plain_label(self) if self.bits is None else f"{self.name}@{self.bits}bit"

    def lossless(self, facts: ModelFacts) -> KVQuant:
        return replace(self, bits=EXACT_BITS)

    # -- fitting -------------------------------------------------------------------------------------------------

    def fit(self, moments: Moments, model: PreTrainedModel) -> Fitted:
        """Thresholds and levels from the sequences that the moments were taken of.

        Raises:
            UserError: the moments are another model's, or carry no sequences; the model caches latents (MLA).
        """
        moments.check(model)
        if not moments.sequences:
            raise UserError(
                f"{self.name} learns from calibration sequences, and these moments carry none: collect again"
            )
        start = time.perf_counter()
        sequences, left = [], self.fit_tokens
        for ids in moments.sequences:
            if left > 0:
                sequences.append(ids[:left])
                left -= ids.numel()
        with prompt_length(model, moments.sequence_length):
            samples = calibration_samples(model, sequences, self._rotations(model), self.sinks)
        tensors = fit_layers(samples, self.outliers, BITS)
        metadata = fit_metadata(
            self,
            moments,
            model,
            fit_tokens=sum(ids.numel() for ids in sequences),
            seconds=time.perf_counter() - start,
        )
        return Fitted(tensors, metadata)

    def _rotations(self, model: PreTrainedModel) -> list[PlaneRotation] | list[None]:
        """Of every layer; None where keys are coded as they are cached."""
        facts = model_facts(model)
        facts.check(self.name, uneven=False, per_head="codes")
        return layer_plane_rotations(model) if self.pre_rope else [None] * facts.num_layers

    # -- the cache -----------------------------------------------------------------------------------------------

    def new_cache(
        self, model: PreTrainedModel, fitted: Fitted | None = None, *, context_length: int | None = None
    ) -> KVCache:
        facts = model_facts(model)
        rotations = self._rotations(model)
        known = check_fitted(self, model, fitted)
        if self.bits is None:
            least = self._share(facts, min(BITS))
            assert self.budget is not None
            if self.budget < least:
                raise self._too_small(least)
        layers = []
        for index, rotation in enumerate(rotations):
            quantiser = self._quantiser(known, facts, index, rotation, attention_device(model, index))
            layers.append(KVQuantLayer(quantiser, self.bits))
        choose = self._choose(facts) if self.bits is None else None
        cache = placed(KVQuantCache(layers, choose, context_length=context_length), model, turning=self.pre_rope)
        return cache.compress_every(self.every)

    def _quantiser(
        self, known: Fitted, facts: ModelFacts, layer: int, rotation: PlaneRotation | None, device: torch.device
    ) -> LayerQuantiser:
        low, high = (known.tensors[f"key_{side}"][layer].to(device) for side in ("low", "high"))
        codebooks = {}
        for part in ("key", "value"):
            learnt = {bits: known.tensors[f"{part}_levels_{bits}"][layer].to(device) for bits in BITS}
            even = {bits: torch.linspace(-1, 1, 2**bits, device=device) for bits in BITS}
            codebooks[part] = learnt if self.nuq else even
        return LayerQuantiser(
            keys=ChannelGrid(low, high, sparse=self.outliers > 0),
            values=TokenGrid(self.outliers, low.numel()),
            key_levels=codebooks["key"],
            value_levels=codebooks["value"],
            rotation=rotation,
            sinks=self.sinks,
            outlier_dtype=torch.bfloat16 if facts.dtype == torch.bfloat16 else torch.float16,
        )

    # -- the budget ----------------------------------------------------------------------------------------------

    def nbytes(self, facts: ModelFacts, fitted: Fitted | None, tokens: int) -> int:
        if self.bits == EXACT_BITS:
            return facts.full_nbytes(tokens)
        others = facts.others_nbytes(tokens)
        bits = self.bits
        if bits is None:
            allowed = allowed_nbytes(self, facts, tokens)
            bits = most(BITS, lambda choice: self._nbytes(facts, choice, tokens), allowed)
        if bits is None:
            least = others + self._nbytes(facts, min(BITS), tokens)
            raise self._too_small(least / reference_nbytes(self, facts, tokens))
        return others + self._nbytes(facts, bits, tokens)

    def _nbytes(self, facts: ModelFacts, bits: int, tokens: int) -> int:
        """Bytes with as many outliers of the keys as in the calibration sequences."""
        width, sinks = facts.num_key_value_heads * facts.head_dim, min(self.sinks, tokens)
        bounds, rows = torch.zeros(1), tokens - sinks
        keys, values = ChannelGrid(bounds, bounds, sparse=self.outliers > 0), TokenGrid(self.outliers, width)
        coded = coded_nbytes(keys, bits, width, rows, round(self.outliers * width * rows))
        coded += coded_nbytes(values, bits, width, rows, 2 * values.per_side * rows)
        return facts.num_layers * (2 * sinks * width * facts.dtype.itemsize + coded)

    def _share(self, facts: ModelFacts, bits: int) -> float:
        """Bytes of a token's codes and scales over those of its uncompressed numbers; outliers come on top."""
        width = facts.num_key_value_heads * facts.head_dim
        return (2 * packed_size(width, bits) + 4) / (4 * width)

    def _too_small(self, least: float) -> UserError:
        assert self.budget is not None
        where = "" if least > self.budget else " (layers that are not compressed take the rest of it)"
        return UserError(
            f"budget {self.budget:g} of {self.name} is below the {least:.3f} that {min(BITS)} bits take{where}: "
            f"raise it, or lower outliers and sinks"
        )

    def _choose(self, facts: ModelFacts) -> Callable[[Callable[[int], int], int], int]:
        """The most bits whose bytes keep to the budget."""

        def choose(nbytes: Callable[[int], int], tokens: int) -> int:
            bits = most(BITS, nbytes, allowed_nbytes(self, facts, tokens))
            if bits is None:
                raise self._too_small(nbytes(min(BITS)) / reference_nbytes(self, facts, tokens))
            return bits

        return choose
