"""What the token-merging methods and StreamingLLM share: sizes, windows and the cache of merged entries."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from transformers import PreTrainedModel

from kvgauge.architecture.facts import ModelFacts, model_facts
from kvgauge.architecture.rotary import layer_rotaries
from kvgauge.contract.budget import allowed_nbytes, largest
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.method import Method, Needs, plain_label
from kvgauge.contract.roles import Lossless, Merger
from kvgauge.errors import UserError, unknown
from kvgauge.layers.building import placed
from kvgauge.layers.two_phase import TwoPhaseLayer
from kvgauge.methods.merging.merged import MergedLayer
from kvgauge.methods.merging.merging_cache import MergingCache
from kvgauge.methods.merging.policy import MergePolicy, newest_window
from kvgauge.methods.merging.traits import CHOICES, DEFAULT, PUBLISHED, PUBLISHED_CLIP, Traits

# γ of AsymKV and KVSlimmer: the discount of a pair grows to 512 over 4,096 entries.
GAMMA = 4096 / math.log(512)

CARDINALITY_NBYTES = 4  # of one entry of one layer, as stored


@dataclass(frozen=True, kw_only=True)
class Streaming(Lossless, Merger, Method):
    """A cache of a limited number of entries, held to it while the prompt is read window by window.

    The number is `max_entries`, or ``start + recent``, or what the byte budget pays for at the length of the context;
    the first that is given decides.

    Attributes:
        start: first tokens that stay as they are, the attention sinks.
        recent: entries behind them.
        max_entries: entries in all.
        window: tokens between two reductions. A layer holds at most `window` entries more than its limit. While
            decoding it is that of `while_decoding`, with a limit by all tokens so far; without that the limit stays the
            context's.

    Raises:
        UserError: no size, ``start + recent`` below 2, a window of 0, or a size that the start alone exceeds.
    """

    start: int = 32
    recent: int | None = None
    max_entries: int | None = None
    window: int = 512

    rule: ClassVar[str]
    layer_type: ClassVar[type[MergedLayer]] = MergedLayer
    cache_type: ClassVar[type[MergingCache]] = MergingCache

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start < 0 or self.window < 1:
            raise UserError(
                f"{self.name} has start {self.start} and window {self.window}: start is 0 or more, window 1 or more"
            )
        if self.fixed_entries is None and self.budget is None:
            raise UserError(f"{self.name} needs a budget, or recent, or max_entries")
        if self.fixed_entries is not None and self.fixed_entries < 2:
            raise UserError(f"{self.name} keeps start + recent = {self.fixed_entries} entries: 2 are the least")
        if self.fixed_entries is not None and self.fixed_entries <= self.start:
            raise UserError(
                f"{self.name} keeps {self.fixed_entries} entries and the {self.start} first ones as they are: "
                f"lower start or keep more"
            )

    @property
    def needs(self) -> Needs:
        return Needs(exact_prefill=False)

    @property
    def fixed_entries(self) -> int | None:
        """The number of entries where no budget decides."""
        if self.max_entries is not None:
            return self.max_entries
        return None if self.recent is None else self.start + self.recent

    def lossless(self, facts: ModelFacts) -> Streaming:
        return replace(self, budget=1.0, recent=None, max_entries=None)

    @property
    def label(self) -> str:
        return plain_label(self) if self.fixed_entries is None else f"{self.name}@{self.fixed_entries}e"

    @property
    def traits(self) -> Traits:
        """How the layers make room."""
        return DEFAULT

    @property
    def discount(self) -> float:
        """γ, in entries."""
        return GAMMA

    @property
    def largest_cardinality(self) -> int | None:
        """The clip of the cardinalities."""
        return None

    def entries(self, tokens: int, facts: ModelFacts) -> int:
        """The most entries that a layer is left with of a context of `tokens` tokens.

        A fixed number does not count the newest window where that stands outside the limit. A budget pays for keys and
        values and for the cardinalities beside them; a budget of 1 merges nothing and needs none.
        """
        if self.fixed_entries is not None:
            outside = newest_window(tokens, self.window) if self.traits.decided_by == "next" else 0
            return self.fixed_entries + outside
        assert self.budget is not None
        if self.budget == 1.0:
            return tokens
        found = largest(0, tokens, partial(self._nbytes, facts), allowed_nbytes(self, facts, tokens))
        assert found is not None
        return found

    def nbytes(self, facts: ModelFacts, fitted: Fitted | None, tokens: int) -> int:
        entries = min(self.entries(tokens, facts), tokens)
        held = facts.compressed_nbytes(tokens) if entries == tokens else self._nbytes(facts, entries)
        return held + facts.others_nbytes(tokens)

    def _nbytes(self, facts: ModelFacts, entries: int) -> int:
        return facts.compressed_nbytes(entries) + entries * facts.num_layers * CARDINALITY_NBYTES

    def bookkeeping_nbytes(self, entries: int, facts: ModelFacts) -> int:
        return 0 if self.rule == "evict" else entries * facts.num_layers * CARDINALITY_NBYTES

    def new_cache(
        self, model: PreTrainedModel, fitted: Fitted | None = None, *, context_length: int | None = None
    ) -> MergingCache:
        facts = self._served(model)
        policy = self.policy(facts)
        layers = [self.layer_type(policy, rotary) for rotary in layer_rotaries(model)]
        cache = placed(self.cache_type(layers, context_length=context_length), model, turning=True)
        return cache.compress_every(self.every)

    def _served(self, model: PreTrainedModel) -> ModelFacts:
        facts = model_facts(model)
        facts.check(self.name, per_head="merges")
        return facts

    def frozen_cache(
        self,
        model: PreTrainedModel,
        sized: Callable[[int], Streaming],
        freeze: Callable[[int, int], TwoPhaseLayer],
        *,
        context_length: int | None = None,
    ) -> MergingCache:
        facts = self._served(model)
        policy = replace(self.policy(facts), entries=lambda tokens: sized(tokens).entries(tokens, facts))
        rotaries = enumerate(layer_rotaries(model))
        layers = [self.layer_type(policy, rotary, partial(freeze, layer)) for layer, rotary in rotaries]
        return placed(self.cache_type(layers, context_length=context_length), model, turning=True)

    def policy(self, facts: ModelFacts) -> MergePolicy:
        """What the layers of a cache go by."""
        return MergePolicy(
            name=self.name,
            entries=lambda tokens: self.entries(tokens, facts),
            start=self.start,
            window=self.window,
            rule=self.curved_rule,
            traits=self.traits,
            gamma=self.discount,
            clip=self.largest_cardinality,
        )

    @property
    def curved_rule(self) -> str:
        """The rule of the keys, of `kvgauge.methods.merging.merge_entries.RULES`, or ``evict``."""
        return self.rule


@dataclass(frozen=True, kw_only=True)
class Merging(Streaming):
    """Merges the cheapest adjacent pairs behind the start; the subclass says what becomes of their keys.

    What the published codes do otherwise is one option each, and ``published: true`` sets them all; see
    `kvgauge.methods.merging.traits`.

    Attributes:
        gamma: γ of the discount ``exp(i/γ)`` of the i-th pair, in entries; None for the papers' 4096 / ln 512.
        clip: largest cardinality that is remembered (5 in the papers' codes), None for no bound. What is clipped keeps
            the sum of its values, and moves the positions of all that follow: a long chain that counts as 5 tokens and
            has the values of all weighs too much in every output.
        pairs: ``chain`` merges runs of chosen pairs into one entry, ``bounded`` lets none grow beyond the clip,
            ``disjoint`` takes no entry twice in one round, ``drop`` merges the first two of a run and drops the others.
        cost: of a pair: ``cardinality`` (attention times tokens), ``attention``, or ``residual`` (how little of it the
            other entries can stand in for, see `kvgauge.methods.merging.merge_costs`), or ``both``.
        decided_by: ``own``: a window merges with the past by its own queries; ``next``: the past merges by the queries
            of the window that comes next, which stays outside the limit.
        position: of an entry: that of its ``first`` or its ``last`` token.
        curvature: of the rule of the keys: ``output`` or ``published``.
        published: all of these as in the published code.

    Raises:
        UserError: a clip or γ out of range, an unknown choice, or options that contradict each other.
    """

    gamma: float | None = None
    clip: int | None = None
    pairs: str | None = None
    cost: str | None = None
    decided_by: str | None = None
    position: str | None = None
    curvature: str | None = None
    published: bool = False

    published_traits: ClassVar[Traits] = PUBLISHED

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip is not None and self.clip < 1:
            raise UserError(f"clip {self.clip} of {self.name} is below 1: an entry stands for one token at least")
        if self.gamma is not None and not self.gamma > 0:
            raise UserError(f"gamma {self.gamma:g} of {self.name} is not above 0: it is a number of entries")
        for option, choices in CHOICES.items():
            given = getattr(self, option)
            if given is not None and given not in choices:
                raise unknown(option, str(given), choices)
            published = getattr(self.published_traits, option)
            if self.published and given not in (None, published):
                raise UserError(
                    f"published: true sets {option} of {self.name} to {published}, and {option} is {given}: "
                    f"leave one of the two out"
                )
        if self.published and self.clip not in (None, PUBLISHED_CLIP):
            raise UserError(
                f"published: true sets clip of {self.name} to {PUBLISHED_CLIP}, and clip is {self.clip}: "
                f"leave one of the two out"
            )
        if self.traits.pairs == "bounded" and self.clip is None:
            raise UserError(f"{self.name} has pairs: bounded and no clip: give a clip, or pairs: chain")
        if self.traits.cost == "residual" and self.gamma is not None:
            raise UserError(f"{self.name} has a gamma, and cost: residual is not discounted: leave one of the two out")
        if self.every is not None and self.traits.decided_by == "next":
            raise UserError(
                f"{self.name} with decided_by: next merges when the window behind has begun, and keeps to no budget "
                f"where one ends: use decided_by: own, or leave while_decoding out"
            )
        if self.curvature is not None and self.rule == "mean":
            raise UserError(f"{self.name} averages its keys, whatever the curvature: leave curvature out")

    @property
    def traits(self) -> Traits:
        chosen = self.published_traits if self.published else DEFAULT
        given = {option: getattr(self, option) for option in CHOICES}
        return replace(chosen, **{option: value for option, value in given.items() if value is not None})

    @property
    def discount(self) -> float:
        return GAMMA if self.gamma is None else self.gamma

    @property
    def largest_cardinality(self) -> int | None:
        return PUBLISHED_CLIP if self.published else self.clip
