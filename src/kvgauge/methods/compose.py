"""Compositions: merge tokens, project what is left, and keep it in few bits, in one cache and under one budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from kvgauge import configuration
from kvgauge.architecture.facts import model_facts
from kvgauge.contract.budget import allowed_nbytes, check_reached, largest, reference_nbytes
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.fitting import check_fitted
from kvgauge.contract.identity import config
from kvgauge.contract.method import Method, Needs, budget_in_force
from kvgauge.contract.roles import Composite, Lossless, Merger, Projector, StorageQuantizer, fitter_of, lossless_of
from kvgauge.errors import UserError, unknown
from kvgauge.layers.cache import KVCache
from kvgauge.layers.two_phase import TwoPhaseLayer
from kvgauge.methods.quantizers import UniformQuantizer
from kvgauge.methods.registry import build_method, list_methods
from kvgauge.store.storage import EXACT, Storage

if TYPE_CHECKING:
    from kvgauge.architecture.facts import ModelFacts
    from kvgauge.calibration.moments import Moments

STEPS = 2**30  # of a share: one is far below a rank of a layer of any model
QUANTIZERS = "quantizer"  # the folder of conf/ with quantisers by name
TARGET = configuration.path_of(UniformQuantizer)  # of a mapping that has bits and no name
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
        fields = {name: value for name, value in config(self.method).items() if name != "budget" or not self.free}
        return {"method": self.source} | fields

    def sized(self, budget: float) -> Member:
        """This member at a share of the bytes, where it has no size of its own."""
        return replace(self, method=self.method.sized(budget)) if self.free else self


@dataclass(frozen=True)
class Members:
    """The members by what they do; `projector` is ``full`` where none was given."""

    merger: Member | None
    projector: Member
    quantizer: StorageQuantizer | None

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
class Compose(Composite, Lossless, Method):
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
        entries = [member.config() for member in self.members.methods]
        quantizer = self.members.quantizer
        if quantizer is not None:
            named = {} if isinstance(quantizer, UniformQuantizer) else {"_target_": configuration.path_of(quantizer)}
            entries.append(named | quantizer.config())
        object.__setattr__(self, "compose", tuple(entries))  # every field spelt out: what makes it another method

    @property
    def needs(self) -> Needs:
        projects = self.members.projector.method.needs
        alone = self.members.merger is None
        libraries = tuple(library for part in self.parts for library in part.needs.libraries)
        return replace(
            projects,
            exact_prefill=projects.exact_prefill and alone,
            reference_bits=self.storage.reference_bits,
            libraries=libraries,
        )

    @property
    def combination(self) -> bool:
        return True

    @property
    def parts(self) -> Sequence[Method]:
        return [member.method for member in self.members.methods]

    @property
    def fitter(self) -> Method:
        return self.members.projector.method

    @cached_property
    def members(self) -> Members:
        """The members, built and checked."""
        if isinstance(self.compose, (str, Mapping)) or not self.compose:
            raise UserError(f"compose of {self.name} is a list of at least one member, e.g. compose: [kqsvd, int4]")
        found: dict[int, Member | StorageQuantizer] = {}
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
        assert not isinstance(merger, StorageQuantizer) and isinstance(projector, Member)
        return Members(merger, projector, quantizer if isinstance(quantizer, StorageQuantizer) else None)

    @property
    def storage(self) -> Storage:
        """In what form numbers are kept."""
        quantizer = self.members.quantizer
        return EXACT if quantizer is None else quantizer.storage()

    def fit(self, moments: Moments, model: PreTrainedModel) -> Fitted | None:
        return fitter_of(self).fit(moments, model)

    def lossless(self, facts: ModelFacts) -> Compose | None:
        """Every member lossless, and nothing quantised."""
        whole = [(member.source, lossless_of(member.method, facts)) for member in self.members.methods]
        if any(method is None for _, method in whole):
            return None
        entries = [Member(source, method, False).config() for source, method in whole if method is not None]
        return replace(self, budget=None, compose=entries)

    # -- the budget ----------------------------------------------------------------------------------------------

    def nbytes(self, facts: ModelFacts, fitted: Fitted | None, tokens: int) -> int:
        bought = self.bought(facts, fitted, tokens)
        return self._nbytes(bought, facts, fitted, tokens) + facts.others_nbytes(tokens)

    def _nbytes(self, members: Members, facts: ModelFacts, fitted: Fitted | None, tokens: int) -> int:
        entries = tokens if members.merger is None else min(tokens, members.merges.entries(tokens, facts))
        size = members.projects.stored_nbytes(facts, fitted, self.storage, entries)
        return size + (members.merges.bookkeeping_nbytes(entries, facts) if entries < tokens else 0)

    def bought(self, facts: ModelFacts, fitted: Fitted | None, tokens: int) -> Members:
        """The members at the sizes that the budget pays for.

        Raises:
            UserError: the budget is below the smallest that the members reach.
        """
        members = self.members
        if self.budget is None:
            return members
        if not any(member.free for member in members.methods):
            try:
                check_reached(self, facts, tokens, self._nbytes(members, facts, fitted, tokens))
            except UserError:
                size = self._nbytes(members, facts, fitted, tokens) + facts.others_nbytes(tokens)
                share = size / reference_nbytes(self, facts, tokens)
                raise UserError(
                    f"budget {self.budget:g} of {self.name}: its members take {share:.3f} and have sizes of their own: "
                    f"raise the budget, take fewer bits or leave a size to the budget"
                ) from None
            return members
        steps = largest(
            1,
            STEPS,
            lambda step: self._nbytes(members.sized(step / STEPS), facts, fitted, tokens),
            allowed_nbytes(self, facts, tokens),
        )
        if steps is None:
            raise UserError(
                f"budget {self.budget:g} of {self.name} is below what its members can reach: "
                f"raise it, take fewer bits or keep fewer tokens exact"
            )
        return members.sized(steps / STEPS)

    # -- the cache -----------------------------------------------------------------------------------------------

    def new_cache(
        self, model: PreTrainedModel, fitted: Fitted | None = None, *, context_length: int | None = None
    ) -> KVCache:
        facts, storage = model_facts(model), self.storage
        if facts.latent is not None and storage is not EXACT:
            raise UserError(f"{self.name}: latents (MLA) have no quantised storage, leave the quantiser out")
        if self.needs.learns is not None:
            check_fitted(self, model, fitted)
        sized = cache(lambda tokens: self.bought(facts, fitted, tokens))
        sized(context_length or facts.max_positions)  # refuses what cannot work before any work is done
        if self.members.merger is None:
            cached = self.members.projects.stored_cache(
                model, fitted, storage, lambda tokens: sized(tokens).projects, context_length=context_length
            )
            return cached.compress_every(self.every)
        if self.every is not None:
            raise UserError(
                f"{self.name} freezes merged entries after the context, and tokens that come later are not merged: "
                f"leave while_decoding or the merger out"
            )
        if facts.latent is not None:
            raise UserError(f"{self.name} merges keys, and this model caches latents (MLA): leave the merger out")

        def freeze(layer: int, tokens: int) -> TwoPhaseLayer:
            return sized(tokens).projects.entry_layer(model, fitted, storage, layer)

        freeze(0, context_length or facts.max_positions)  # refuses what cannot take over entries
        merges: Callable[[int], Merger] = lambda tokens: sized(tokens).merges  # noqa: E731
        return self.members.merges.frozen_cache(model, merges, freeze, context_length=context_length)


def _member(name: str, entry: Any) -> Member | StorageQuantizer:
    """The member of an entry of the list."""
    if isinstance(entry, str):
        entry = {"method": entry}
    if not isinstance(entry, Mapping) or not (
        {"bits", "_target_"} & set(entry) or isinstance(entry.get("method"), str)
    ):
        raise UserError(f"a member of {name} is a name or a mapping as {{method: xkv, group_size: 5}}, not {entry!r}")
    fields = {str(key): value for key, value in entry.items() if key != "method"}
    source = entry.get("method")
    quantizers = configuration.names(QUANTIZERS)
    if source is None or source in quantizers:
        node = {"_target_": TARGET} if source is None else configuration.read(QUANTIZERS, source)
        return _quantizer(node | fields)
    if source not in list_methods() and "." not in source:
        raise unknown(f"member of {name}", source, [*list_methods(), *quantizers])
    method = build_method(source, **fields)
    if method.every is not None:
        raise UserError(
            f"while_decoding stands in {source}, a member of {name}: it is an option of the whole, put it there"
        )
    return Member(source, method, "budget" not in fields and budget_in_force(method) is not None)


def _quantizer(node: Mapping[str, Any]) -> StorageQuantizer:
    cls = configuration.target_class(str(node["_target_"]), "quantiser")
    known = {field.name for field in dataclasses.fields(cls)}
    for key in node:
        if key not in known and key != "_target_":
            raise unknown("field of a quantiser", key, known)
    quantizer = configuration.build(node, "quantiser")
    if not isinstance(quantizer, StorageQuantizer):
        raise UserError(f"{node['_target_']} is no quantiser of compositions: it has to be a StorageQuantizer")
    return quantizer


def _place(name: str, member: Member | StorageQuantizer) -> int:
    """Where in `ORDER` a member belongs."""
    if isinstance(member, StorageQuantizer):
        return 2
    kinds = [place for place, kind in enumerate((Merger, Projector)) if isinstance(member.method, kind)]
    if not kinds:
        raise UserError(
            f"{member.method.name} takes no part in compositions, it neither hands over entries nor leaves its storage "
            f"to {name}: compose per-head methods, xkv, full or a method that merges"
        )
    return kinds[0]
