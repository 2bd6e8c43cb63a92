"""MiniCache (arXiv 2405.14366): pairs of layers share the directions of their keys and values."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from kvgauge.architecture.facts import ModelFacts, model_facts
from kvgauge.architecture.rotations import described, layer_rotation
from kvgauge.contract.budget import allowed_nbytes, largest
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.method import Method
from kvgauge.contract.roles import Lossless
from kvgauge.errors import UserError
from kvgauge.layers.building import placed
from kvgauge.layers.cache import KVCache, LayerCache
from kvgauge.layers.exact import ExactLayer
from kvgauge.methods.across_layers.merged_pair import MergedPair, MergeRule
from kvgauge.methods.across_layers.uniform import layer_range

COLUMN_BYTES = 4  # the column of a retained token, int32


@dataclass(frozen=True, kw_only=True)
class MiniCache(Lossless, Method):
    """Spherical interpolation of every pair of layers from `start_layer` up, with exact lengths and retained tokens.

    A pair keeps one unit vector per token and kv-head, two lengths, and both layers' exact vectors of the retained
    tokens, for keys and values separately. The rotation of a token's keys is the same in both layers, so angles and
    interpolation do not depend on it. A token's distance is the mean angle over its kv-heads.

    With pairs from the middle up the cache cannot go below three quarters of its bytes, which is the 1.3× that the xKV
    paper reports for this method.

    Attributes:
        start_layer: first layer of the first pair; None is the middle of the model. An odd last layer stays exact.
        interpolation: t of the spherical interpolation; 0.5 in the xKV paper's comparison.
        gamma: tokens at a distance of at least ``d_min + γ (d_max − d_min)`` stay exact: 0 keeps all, near 1 few.
            A budget decides instead: it keeps as many of the most distant tokens as it pays for. While decoding, the
            distances compared are those of the tokens that are merged together.

    Raises:
        UserError: values out of range.
    """

    name: str = "minicache"
    start_layer: int | None = None
    interpolation: float = 0.5
    gamma: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        for label in ("interpolation", "gamma"):
            if not 0.0 <= getattr(self, label) <= 1.0:
                raise UserError(f"{label} {getattr(self, label):g} of {self.name} is outside [0, 1]")

    def lossless(self, facts: ModelFacts) -> MiniCache:
        return replace(self, budget=None, gamma=0.0)

    def pairs(self, num_layers: int) -> list[int]:
        """The first layer of every pair.

        Raises:
            UserError: there is no such layer, or no pair behind it.
        """
        start = num_layers // 2 if self.start_layer is None else self.start_layer
        layers = layer_range(self.name, start, None, num_layers)
        if len(layers) < 2:
            raise UserError(f"start_layer {start} of {self.name} leaves no pair of layers: the model has {num_layers}")
        return list(layers[: len(layers) // 2 * 2 : 2])

    def nbytes(self, facts: ModelFacts, fitted: Fitted | None, tokens: int) -> int:
        retained = 0 if self.budget is None else self.retained(facts, tokens)
        whole = self.gamma == 0.0 and self.budget is None
        return self._nbytes(facts, tokens, tokens if whole else retained) + facts.others_nbytes(tokens)

    def _nbytes(self, facts: ModelFacts, tokens: int, retained: int) -> int:
        """Bytes with so many exact tokens of the keys, and as many of the values, of every pair."""
        pairs, itemsize = len(self.pairs(facts.num_layers)), facts.dtype.itemsize
        width = facts.num_key_value_heads * facts.head_dim
        merged = pairs * tokens * 2 * (width + 2 * facts.num_key_value_heads) * itemsize
        exact = (facts.num_layers - 2 * pairs) * tokens * 2 * width * itemsize
        return merged + exact + retained * pairs * 2 * (2 * width * itemsize + COLUMN_BYTES)

    def retained(self, facts: ModelFacts, tokens: int) -> int:
        """Tokens of a pair that the budget keeps exact, for keys and for values alike.

        Raises:
            UserError: the budget is below what the directions and lengths take.
        """
        found = largest(
            0, tokens, lambda count: self._nbytes(facts, tokens, count), allowed_nbytes(self, facts, tokens)
        )
        if found is None:
            pairs = len(self.pairs(facts.num_layers))
            least = (self._nbytes(facts, tokens, 0) + facts.others_nbytes(tokens)) / facts.full_nbytes(tokens)
            raise UserError(
                f"budget {self.budget:g} of {self.name} is below the {least:.3f} that merging {pairs} pairs of "
                f"{facts.num_layers} layers reaches: raise it or lower start_layer"
            )
        return found

    def new_cache(
        self, model: PreTrainedModel, fitted: Fitted | None = None, *, context_length: int | None = None
    ) -> KVCache:
        facts = model_facts(model)
        facts.check(self.name, uneven=False, per_head="merges")
        for first in self.pairs(facts.num_layers):
            self._check_rotations(model, first)
        if self.budget is not None:
            self.retained(facts, facts.max_positions)  # refuses what cannot work before any work is done
        count = None if self.budget is None else lambda tokens: self.retained(facts, tokens)
        rule = MergeRule(self.interpolation, self.gamma, count)
        layers: list[LayerCache] = [ExactLayer() for _ in range(facts.num_layers)]
        for first in self.pairs(facts.num_layers):
            layers[first : first + 2] = MergedPair(rule).members
        return placed(KVCache(layers, context_length=context_length), model).compress_every(self.every)

    def _check_rotations(self, model: PreTrainedModel, first: int) -> None:
        """Refuse a pair of layers that share no directions, for their keys are turned otherwise."""
        one, other = layer_rotation(model, first), layer_rotation(model, first + 1)
        if not one.turns_as(other):
            raise UserError(
                f"{self.name} has no directions for layers {first} and {first + 1} of {type(model).__name__}, which "
                f"rotate differently ({described(one)}; {described(other)}): choose a start_layer of other pairs"
            )
