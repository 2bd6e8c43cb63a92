"""transformers' `QuantizedCache` as it comes, under the same meter: the off-the-shelf reference."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import HQQQuantizedLayer, QuantizedLayer, QuantoQuantizedLayer

from kvgauge.architecture.facts import model_facts
from kvgauge.contract.budget import most
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.method import Method, Needs, plain_label
from kvgauge.contract.roles import Quantizer
from kvgauge.errors import UserError, unknown
from kvgauge.layers.building import placed
from kvgauge.layers.cache import KVCache
from kvgauge.methods.transformers_quantized.layer import TransformersQuantizedLayer

if TYPE_CHECKING:
    from kvgauge.architecture.facts import ModelFacts


@dataclass(frozen=True)
class Backend:
    """A package that transformers can quantise caches with.

    Attributes:
        package: to install.
        module: to import.
        layer: transformers' class.
        bits: numbers of bits that work, ascending. hqq 0.2.8 cannot read back the 3 bits that it writes.
        axis: along which groups are runs of one token's numbers.
        whole_bytes: packs groups of equal place, so that the groups of a token must fill bytes.
    """

    package: str
    module: str
    layer: Callable[..., QuantizedLayer]
    bits: tuple[int, ...]
    axis: int
    whole_bytes: bool


BACKENDS = {
    "hqq": Backend("hqq", "hqq", HQQQuantizedLayer, (2, 4, 8), axis=1, whole_bytes=True),
    "quanto": Backend("optimum-quanto", "optimum.quanto", QuantoQuantizedLayer, (2, 4), axis=0, whole_bytes=False),
}


@dataclass(frozen=True, kw_only=True)
class QuantizedCache(Quantizer, Method):
    """Groups of each token's numbers on grids of their own, by hqq or quanto, in transformers' classes.

    transformers would code the prompt's first chunk as it comes; here the prefill is exact and coded once, by
    ``compress``, as for every other method. Scales are kept in the cache's dtype, as transformers does: in float32 they
    weigh twice. There is no setting that loses nothing.

    Attributes:
        bits: hqq 2, 4 or 8; quanto 2 or 4. It overrides the budget, which takes the most bits whose bytes fit.
        backend: ``hqq``, or ``quanto``, which compiles a little C++ at its first use.
        group_size: numbers that share a scale, at most; the largest divisor of head_dim that the backend can pack.
        residual_length: new tokens that wait exactly until they are coded.

    Raises:
        UserError: values out of range.
    """

    name: str = "quantized_cache"
    bits: int | None = None
    backend: str = "hqq"
    group_size: int = 64
    residual_length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backend not in BACKENDS:
            raise unknown(f"backend of {self.name}", self.backend, BACKENDS)
        known = self._backend.bits
        if self.bits is None and self.budget is None:
            raise UserError(f"{self.name} needs a budget, or bits: one of {known}")
        if self.bits is not None and self.bits not in known:
            raise UserError(f"bits {self.bits} of {self.name}: {self.backend} can do {', '.join(map(str, known))}")
        if self.group_size < 1 or self.residual_length < 1:
            raise UserError(f"group_size and residual_length of {self.name} are 1 or more")

    @property
    def _backend(self) -> Backend:
        return BACKENDS[self.backend]

    @property
    def needs(self) -> Needs:
        return Needs(reference_bits=16, libraries=(self._backend.package,) if installed(self._backend.module) else ())

    @property
    def bit_choices(self) -> tuple[int, ...]:
        return self._backend.bits

    @property
    def label(self) -> str:
        return plain_label(self) if self.bits is None else f"{self.name}@{self.backend}{self.bits}bit"

    # -- the budget ----------------------------------------------------------------------------------------------

    def group(self, head_dim: int, bits: int) -> int:
        """Numbers that share a scale.

        Raises:
            UserError: a head is too small for the backend to pack.
        """
        per_byte = self._packed(bits)
        if head_dim % per_byte:
            raise UserError(f"{self.name} cannot pack heads of {head_dim} at {bits} bits: use more bits")
        return gcd(self.group_size, head_dim // per_byte)

    def _packed(self, bits: int) -> int:
        """Numbers that have to be packed together."""
        return 8 // bits if self._backend.whole_bytes else 1

    def bits_per_number(self, facts: ModelFacts, bits: int) -> float:
        """Of codes, and of the two scales of a group."""
        return bits + 2 * 8 * facts.dtype.itemsize / self.group(facts.head_dim, bits)

    def nbytes(self, facts: ModelFacts, fitted: Fitted | None, tokens: int) -> int:
        return self._nbytes(facts, self.chosen_bits(facts), tokens) + facts.others_nbytes(tokens)

    def _nbytes(self, facts: ModelFacts, bits: int, tokens: int) -> int:
        return round(facts.compressed_nbytes(tokens, 8) / 8 * self.bits_per_number(facts, bits))

    def chosen_bits(self, facts: ModelFacts) -> int:
        """The explicit bits, or the most that fit.

        Raises:
            UserError: none fits.
        """
        if self.bits is not None:
            return self.bits
        if facts.others_nbytes(facts.max_positions):  # the bits are chosen before the length of a context is known
            raise UserError(
                f"budget {self.budget:g} of {self.name} would be another share at every length, for {facts.name} has "
                f"layers that are not compressed: give bits"
            )
        possible = [bits for bits in self.bit_choices if facts.head_dim % self._packed(bits) == 0]
        chosen = most(possible, lambda bits: self.bits_per_number(facts, bits) / 16, self.budget or 0.0)
        if chosen is None:
            least = min(self.bits_per_number(facts, bits) / 16 for bits in possible)
            raise UserError(
                f"budget {self.budget:g} of {self.name} is below the {least:.3f} that {self.backend} "
                f"reaches on this model in {facts.dtype}: raise it, or load the model in bfloat16"
            )
        return chosen

    # -- the cache -----------------------------------------------------------------------------------------------

    def new_cache(
        self, model: PreTrainedModel, fitted: Fitted | None = None, *, context_length: int | None = None
    ) -> KVCache:
        facts = model_facts(model)
        facts.check(self.name, uneven=False, per_head="stores")
        bits = self.chosen_bits(facts)
        new_layer = self.new_layer(bits, self.group(facts.head_dim, bits))
        self._try(new_layer, self.group(facts.head_dim, bits))
        layers = [TransformersQuantizedLayer(new_layer) for _ in range(facts.num_layers)]
        return placed(KVCache(layers, context_length=context_length), model).compress_every(self.every)

    def new_layer(self, bits: int, group: int) -> Callable[[], QuantizedLayer]:
        """What makes an empty layer of transformers; `group` numbers share a scale.

        Raises:
            UserError: the backend's package is missing.
        """
        backend = self._backend
        if not installed(backend.module):
            raise UserError(f"{self.name} with backend {self.backend} needs a package: pip install {backend.package}")
        return partial(
            backend.layer,
            nbits=bits,
            axis_key=backend.axis,
            axis_value=backend.axis,
            q_group_size=group,
            residual_length=self.residual_length,
        )

    def _try(self, new_layer: Callable[[], QuantizedLayer], group: int) -> None:
        """Code and decode a few zeros: what a backend compiles at its first use fails here, not behind a prefill."""
        try:
            trial = new_layer()
            rows = torch.zeros(1, 1, 8, group)
            trial.update(rows, rows)
            trial.update(rows, rows)
        except (ImportError, OSError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            raise UserError(
                f"backend {self.backend} of {self.name} does not work here ({reason}): "
                f"install a C++ compiler, or use another backend"
            ) from error


def installed(module: str) -> bool:
    """Whether `module` can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is in is not there
        return False
