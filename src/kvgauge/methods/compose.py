"""Compositions: merge tokens, project what is left, and keep it in few bits, in one cache and under one budget."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from kvgauge.architecture.facts import model_facts
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.method import Method, check_fitted
from kvgauge.contract.roles import Merger, Projector
from kvgauge.errors import UserError, unknown
from kvgauge.layers.cache import KVCache
from kvgauge.layers.two_phase import TwoPhaseLayer
from kvgauge.methods.quantizers import NAMES, Quantizer
from kvgauge.methods.registry import build_method, list_methods
from kvgauge.store.storage import EXACT, Storage

if TYPE_CHECKING:
    from kvgauge.architecture.facts import ModelFacts
    from kvgauge.calibration.moments import Moments

HALVINGS = 30  # of the range of a member's budget: far below one rank of one layer of any model
ORDER = ("a method that merges", "a method that projects", "a quantiser")


@dataclass(frozen=True)
class Member:
    """One method of a composition.

    Attributes:
        source: the name of its configuration.
        method: built from it.
        free: its budget is solved from the budget of the whole: the user gave it no size of its own.
    """

    source: str
    method: Method
    free: bool

    def config(self) -> dict[str, Any]:
        """The entry that builds this member again, every field spelt out."""
        fields = {name: value for name, value in self.method.config().items() if name != "budget" or not self.free}
        return {"method": self.source} | fields

    def sized(self, budget: float) -> Member:
        """This member at a share of the bytes, where it has no size of its own."""
        return replace(self, method=replace(self.method, budget=budget)) if self.free else self


@dataclass(frozen=True)
class Members:
    """The members by what they do; `projector` is ``full`` where none was given."""

    merger: Member | None
    projector: Member
    quantizer: Quantizer | None

    @property
    def methods(self) -> list[Member]:
        return [member for member in (self.merger, self.projector) if member is not None]

    @property
    def merges(self) -> Merger:
        assert self.merger is not None and isinstance(self.merger.method, Merger)
        return self.merger.method

    @property
    def projects(self) -> Projector:
        assert isinstance(self.projector.method, Projector)
        return self.projector.method

    def sized(self, budget: float) -> Members:
        """Every free member at the same share."""
        merger = None if self.merger is None else self.merger.sized(budget)
        return replace(self, merger=merger, projector=self.projector.sized(budget))


@dataclass(frozen=True, kw_only=True)
class Compose(Method):
    """At most one method that merges tokens, one that projects them and one quantiser, in this order.

    The merger reads the context and merges while it comes; at its end the entries are frozen, at their positions, and
    the projector takes them as it would take tokens, the logarithm of their cardinality added to the scores. What the
    projector stores is kept in the bits of the quantiser; what it keeps as it is (sinks, windows, the tail of xKV) in
    16 bits. Tokens that come later are not merged; they are projected and quantised as the projector does.

    `budget` is that of the whole. Members that the user gave a size of their own keep it: ranks, entries, or a budget,
    which is then the share of the numbers that the member keeps. The others get the largest share at which the measured
    bytes of everything, scales and cardinalities included, stay within the budget; two free members get the same share.
    Where even whole members stay below the budget, the cache is smaller than it allows. Without a budget, free members
    keep the budgets of their own configurations.

    Attributes:
        compose: the members: names (``kqsvd``, ``int4``) or mappings with overrides
            (``{method: xkv, group_size: 5}``, ``{bits: 4, axis: channel, group: 32}``).

    Raises:
        UserError: no members, members out of order or that take no part, two of a kind, or a quantiser alone.
    """

    name: str = "compose"
    compose: Sequence[str | Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        projector = self.members.projector.method
        if projector.learns:
            object.__setattr__(self, "learns", True)  # of this instance: the projector's fit serves the whole
        if self.members.merger is not None or not projector.exact_prefill:
            object.__setattr__(self, "exact_prefill", False)

    @property
    def combination(self) -> bool:
        return True

    @cached_property
    def members(self) -> Members:
        """The members, built and checked."""
        if isinstance(self.compose, (str, Mapping)) or not self.compose:
            raise UserError(f"compose of {self.name} is a list of at least one member, e.g. compose: [kqsvd, int4]")
        found: dict[int, Member | Quantizer] = {}
        for entry in self.compose:
            member = _member(self.name, entry)
            place = _place(self.name, member)
            if place in found:
                raise UserError(f"{self.name} has two members that are {ORDER[place]}: leave one of them out")
            if any(later > place for later in found):
                raise UserError(
                    f"{self.name} has {ORDER[place]} behind {ORDER[max(found)]}, which leaves it nothing to work on: "
                    f"put it first"
                )
            found[place] = member
        if set(found) == {2}:
            raise UserError(f"{self.name} has a quantiser alone: say what it quantises, e.g. compose: [full, int4]")
        merger, projector, quantizer = (found.get(place) for place in range(3))
        if projector is None:
            projector = Member("full", build_method("full"), False)
        assert not isinstance(merger, Quantizer) and isinstance(projector, Member)
        return Members(merger, projector, quantizer if isinstance(quantizer, Quantizer) else None)

    @property
    def storage(self) -> Storage:
        """In what form numbers are kept."""
        quantizer = self.members.quantizer
        return EXACT if quantizer is None else quantizer.storage()

    @property
    def reference_bits(self) -> int | None:
        return self.storage.reference_bits

    @property
    def fitter(self) -> Method:
        return self.members.projector.method.fitter

    def fit(self, moments: Moments, model: PreTrainedModel) -> Fitted | None:
        return self.fitter.fit(moments, model)

    def fit_config(self) -> dict[str, Any]:
        return self.fitter.fit_config()

    def config(self) -> dict[str, Any]:
        entries = [member.config() for member in self.members.methods]
        if self.members.quantizer is not None:
            entries.append(self.members.quantizer.config())
        return super().config() | {"compose": entries}

    def code_version(self) -> str:
        versions = [super().code_version(), *(member.method.code_version() for member in self.members.methods)]
        return hashlib.sha256(" ".join(versions).encode()).hexdigest()[:16]

    def lossless(self, facts: ModelFacts) -> Compose | None:
        """Every member lossless, and nothing quantised."""
        whole = [(member.source, member.method.lossless(facts)) for member in self.members.methods]
        if any(method is None for _, method in whole):
            return None
        entries = [Member(source, method, False).config() for source, method in whole if method is not None]
        return replace(self, budget=None, compose=entries)

    # -- the budget ----------------------------------------------------------------------------------------------

    def nbytes(self, members: Members, facts: ModelFacts, fitted: Fitted | None, tokens: int) -> int:
        """Bytes of one sequence right after the compression of a context of `tokens` tokens."""
        entries = tokens if members.merger is None else min(tokens, members.merges.entries(tokens, facts))
        size = members.projects.stored_nbytes(facts, fitted, self.storage, entries)
        return size + (members.merges.bookkeeping_nbytes(entries, facts) if entries < tokens else 0)

    def sized(self, facts: ModelFacts, fitted: Fitted | None, tokens: int) -> Members:
        """The members at the sizes that the budget pays for.

        Raises:
            UserError: the budget is below the smallest that the members reach.
        """
        members = self.members
        if self.budget is None:
            return members
        limit = self.budget * self.reference_nbytes(facts, tokens)
        if not any(member.free for member in members.methods):
            size = self.nbytes(members, facts, fitted, tokens)
            if size > 1.02 * limit:
                share = size / self.reference_nbytes(facts, tokens)
                raise UserError(
                    f"budget {self.budget:g} of {self.name}: its members take {share:.3f} and have sizes of their own: "
                    f"raise the budget, take fewer bits or leave a size to the budget"
                )
            return members
        if self.nbytes(members.sized(1.0), facts, fitted, tokens) <= limit:
            return members.sized(1.0)
        low, high, best = 0.0, 1.0, None
        for _ in range(HALVINGS):
            share = (low + high) / 2
            try:
                within = self.nbytes(members.sized(share), facts, fitted, tokens) <= limit
            except UserError:  # too little for a member
                low = share
                continue
            if within:
                low = best = share
            else:
                high = share
        if best is None:
            raise UserError(
                f"budget {self.budget:g} of {self.name} is below what its members can reach: "
                f"raise it, take fewer bits or keep fewer tokens exact"
            )
        return members.sized(best)

    # -- the cache -----------------------------------------------------------------------------------------------

    def new_cache(
        self, model: PreTrainedModel, fitted: Fitted | None = None, *, context_length: int | None = None
    ) -> KVCache:
        facts, storage = model_facts(model), self.storage
        if facts.latent is not None and storage is not EXACT:
            raise UserError(f"{self.name}: latents (MLA) have no quantised storage, leave the quantiser out")
        if self.learns:
            check_fitted(self.fitter, model, fitted)
        sized = cache(lambda tokens: self.sized(facts, fitted, tokens))
        sized(context_length or facts.max_positions)  # refuses what cannot work before any work is done
        if self.members.merger is None:
            return self.members.projects.stored_cache(
                model, fitted, storage, lambda tokens: sized(tokens).projects, context_length=context_length
            )
        if facts.latent is not None:
            raise UserError(f"{self.name} merges keys, and this model caches latents (MLA): leave the merger out")

        def freeze(layer: int, tokens: int) -> TwoPhaseLayer:
            return sized(tokens).projects.entry_layer(model, fitted, storage, layer)

        freeze(0, context_length or facts.max_positions)  # refuses what cannot take over entries
        merges: Callable[[int], Merger] = lambda tokens: sized(tokens).merges  # noqa: E731
        return self.members.merges.frozen_cache(model, merges, freeze, context_length=context_length)


def _member(name: str, entry: Any) -> Member | Quantizer:
    """The member of an entry of the list."""
    if isinstance(entry, str):
        entry = {"method": entry}
    if not isinstance(entry, Mapping) or not ("bits" in entry or isinstance(entry.get("method"), str)):
        raise UserError(f"a member of {name} is a name or a mapping as {{method: xkv, group_size: 5}}, not {entry!r}")
    fields = {str(key): value for key, value in entry.items() if key != "method"}
    source = entry.get("method")
    if source is None or source in NAMES:
        fields = ({} if source is None else {"bits": NAMES[source]}) | fields
        for key in fields:
            if key not in Quantizer.__dataclass_fields__:
                raise unknown("field of a quantiser", key, Quantizer.__dataclass_fields__)
        return Quantizer(**fields)
    if source not in list_methods():
        raise unknown(f"member of {name}", source, [*list_methods(), *NAMES])
    method = build_method(source, **fields)
    return Member(source, method, "budget" not in fields and method.budgeted)


def _place(name: str, member: Member | Quantizer) -> int:
    """Where in `ORDER` a member belongs."""
    if isinstance(member, Quantizer):
        return 2
    kinds = [place for place, kind in enumerate((Merger, Projector)) if isinstance(member.method, kind)]
    if not kinds:
        raise UserError(
            f"{member.method.name} takes no part in compositions, it neither hands over entries nor leaves its storage "
            f"to {name}: compose per-head methods, xkv, full or a method that merges"
        )
    return kinds[0]
