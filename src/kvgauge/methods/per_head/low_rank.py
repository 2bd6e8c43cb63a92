"""What K-SVD, Eigen and KQ-SVD share: ranks, projections and the cache of per-head latents."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.architecture.facts import ModelFacts, attention_device, model_facts
from kvgauge.architecture.rotations import layer_rotation
from kvgauge.calibration.allocation import LOSSES, check_allocation
from kvgauge.contract.budget import allowed_nbytes
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.fitting import check_fitted, fit_metadata
from kvgauge.contract.method import Method, Needs, plain_label
from kvgauge.contract.roles import Lossless, Projector
from kvgauge.errors import UserError
from kvgauge.layers.building import placed
from kvgauge.layers.cache import KVCache
from kvgauge.layers.two_phase import TwoPhaseLayer
from kvgauge.methods.per_head.factorization import Pair
from kvgauge.methods.per_head.head_losses import energy_losses, greedy_losses
from kvgauge.methods.per_head.latents import SUITED, HeadProjections, LatentLayer, LayerProjections
from kvgauge.methods.per_head.latents_mla import ProjectedLatentLayer
from kvgauge.methods.per_head.ranks import (
    Ranks,
    allocated_ranks,
    budget_ranks,
    epsilon_ranks,
    explicit_ranks,
    latent_ranks,
)
from kvgauge.methods.per_head.streaming_latents import StreamingLatentCache, StreamingLatentLayer
from kvgauge.store.storage import EXACT, PARTS, Storage

if TYPE_CHECKING:
    from kvgauge.calibration.moments import Moments


@dataclass(frozen=True, kw_only=True)
class LowRankPerHead(Projector, Lossless, Method):
    """Low-rank pairs per kv-head; the subclass says which.

    Exactly one of `budget`, `epsilon` and the explicit ranks decides; explicit ranks come first, then `epsilon`.

    Attributes:
        rank: rank of keys and values.
        rank_k, rank_v: ranks of keys and of values, each instead of `rank`.
        epsilon: per layer the smallest rank whose discarded energy is at most ε² of the total.
        rope: ``post`` works on keys and queries as they are cached; ``pre`` on those before the rotation, for fidelity
            studies only: a cache would have to rotate what it rebuilds.
        sinks, window: first and most recent tokens that stay exact; their bytes count in the budget.
        allocate: how a budget is split over layers and over keys and values: ``uniform``: evenly; ``energy``: by the
            discarded energy of scores and of V W_O on the calibration tokens; ``greedy``: by the error of attention
            outputs measured on held-out sequences (see `kvgauge.calibration.allocation`). The fit holds the losses.
        compress_prefill: project every chunk of the prompt once it has been attended to, so that the exact keys of the
            whole context never exist. Later chunks then see latents, so the prefill is no longer the model's own.

    Raises:
        UserError: no rank, or contradicting values.
    """

    rank: int | None = None
    rank_k: int | None = None
    rank_v: int | None = None
    epsilon: float | None = None
    rope: str = "post"
    sinks: int = 0
    window: int = 0
    allocate: str = "uniform"
    compress_prefill: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope not in ("post", "pre"):
            raise UserError(f"rope of {self.name} is `post` or `pre`, not {self.rope!r}")
        if self.sinks < 0 or self.window < 0:
            raise UserError(f"sinks and window of {self.name} are numbers of tokens, 0 or more")
        if self.rank is None and (self.rank_k is None) != (self.rank_v is None) and self.budget is None:
            raise UserError(f"{self.name} has one of rank_k and rank_v: give both, or rank")
        if all(value is None for value in (self.rank, self.rank_k, self.rank_v, self.epsilon, self.budget)):
            raise UserError(f"{self.name} needs a budget, a rank, rank_k and rank_v, or an epsilon")
        given = [name for name in ("rank", "rank_k", "rank_v", "epsilon") if getattr(self, name) is not None]
        check_allocation(self.name, self.allocate, given[0] if given else None)
        if self.allocate != "uniform" and self.rope == "pre":
            raise UserError(
                f"allocate: {self.allocate} of {self.name} measures keys as they are cached: use rope: post"
            )

    @property
    def needs(self) -> Needs:
        # losses in closed form cost nothing and are always there; measured ones take forward passes
        measured = {"allocate": "greedy", "sinks": self.sinks} if self.allocate == "greedy" else {}
        return Needs(learns={"rope": self.rope} | measured, exact_prefill=not self.compress_prefill)

    @property
    def label(self) -> str:
        rank_k = self.rank if self.rank_k is None else self.rank_k
        rank_v = self.rank if self.rank_v is None else self.rank_v
        if rank_k is not None and rank_v is not None:
            return f"{self.name}@r{rank_k}" if rank_k == rank_v else f"{self.name}@r{rank_k},{rank_v}"
        return plain_label(self) if self.epsilon is None else f"{self.name}@eps{self.epsilon:g}"

    def lossless(self, facts: ModelFacts) -> LowRankPerHead:
        return replace(self, rank=facts.head_dim, rank_k=None, rank_v=None, allocate="uniform")

    # -- fitting -------------------------------------------------------------------------------------------------

    @abstractmethod
    def key_pair(self, moments: Moments) -> Pair:
        """The pair of keys for all layers and heads (layers, num_key_value_heads, head_dim, head_dim)."""

    @abstractmethod
    def value_pair(self, moments: Moments, model: PreTrainedModel) -> Pair:
        """The pair of values, shapes as `key_pair`."""

    def latent_pair(self, moments: Moments, model: PreTrainedModel) -> Pair:
        """The pair of MLA's latents, which are keys and values at once: one pair serves both.

        Raises:
            UserError: the method has none.
        """
        raise UserError(f"{self.name} has no pair for latents that are keys and values at once (MLA): use kqsvd or xkv")

    @abstractmethod
    def energies(self, spectrum: Tensor) -> Tensor:
        """What the tolerance ε counts, from a spectrum: chosen so that the decays of the methods compare."""

    def fit(self, moments: Moments, model: PreTrainedModel) -> Fitted:
        """The pairs at full rank, best direction first; any rank is a prefix, so one fit serves every budget.

        Raises:
            UserError: the moments are another model's, or hold values that are not finite.
        """
        moments.check(model)
        start = time.perf_counter()
        facts = model_facts(model)
        facts.check(self.name, uneven=False)
        if facts.latent is None:
            keys, values = self.key_pair(moments), self.value_pair(moments, model)
        else:
            keys = values = self.latent_pair(moments, model)
        tensors = {
            "A": keys.A,
            "B": keys.B,
            "A_v": values.A,
            "B_v": values.B,
            "spectrum_k": keys.spectrum,
            "spectrum_v": values.spectrum,
        }
        if facts.latent is not None:
            if self.allocate != "uniform":
                raise UserError(
                    f"{self.name} has one latent (MLA), no keys and values to allocate to: leave allocate out"
                )
        elif self.allocate == "greedy":
            losses = greedy_losses(self.name, keys, values, moments, model, self.sinks)
            tensors |= dict(zip(LOSSES, losses, strict=True))
        elif self.rope == "post":
            tensors |= dict(zip(LOSSES, energy_losses(keys, values, moments, model), strict=True))
        metadata = fit_metadata(
            self,
            moments,
            model,
            floored_eigenvalues={"keys": keys.floored, "values": values.floored},
            qk_rope_head_dim=None if facts.latent is None else facts.latent.qk_rope_head_dim,
            seconds=time.perf_counter() - start,
        )
        fitted = Fitted(tensors, metadata)
        metadata["ranks"] = self.ranks(fitted, facts)
        return fitted

    # -- ranks ---------------------------------------------------------------------------------------------------

    def ranks(self, fitted: Fitted, facts: ModelFacts, context_length: int | None = None) -> Ranks:
        """(rank_k, rank_v) per layer; for MLA's latents the same rank twice.

        Args:
            fitted: holds the spectra that ε needs, and the losses that an allocation needs.
            facts: of the model.
            context_length: tokens of the context, which a budget with exact sinks and window depends on; None leaves
                them out.

        Raises:
            UserError: ranks out of range, or a budget that the exact tokens alone exceed.
        """
        rank_k = self.rank if self.rank_k is None else self.rank_k
        rank_v = self.rank if self.rank_v is None else self.rank_v
        num_layers, head_dim = facts.num_layers, facts.head_dim
        if facts.latent is not None:
            if rank_k != rank_v:
                raise UserError(f"rank_k and rank_v of {self.name}: this model has one latent (MLA), give rank instead")
            if rank_k is None and self.epsilon is None:
                share = self._share(facts, context_length)
                return latent_ranks(self.name, share, num_layers, head_dim, facts.latent.qk_rope_head_dim)
        if rank_k is not None and rank_v is not None:
            return explicit_ranks(self.name, rank_k, rank_v, num_layers, head_dim)
        if self.epsilon is not None:
            energies_k, energies_v = (self.energies(fitted.tensors[f"spectrum_{part}"]) for part in ("k", "v"))
            return epsilon_ranks(energies_k, energies_v, self.epsilon)
        share = self._share(facts, context_length)
        numbers = 2.0 * head_dim * share
        if context_length is not None:
            exact = min(self.sinks + self.window, context_length)
            if exact == context_length:
                return [(head_dim, head_dim)] * num_layers
            numbers = 2.0 * head_dim * (share * context_length - exact) / (context_length - exact)
            if numbers < 2:
                raise UserError(
                    f"budget {self.budget:g} of {self.name} does not pay for {exact} exact tokens of {context_length}: "
                    f"lower sinks and window or raise the budget"
                )
        if rank_k is not None or rank_v is not None:
            return self._complete(rank_k, rank_v, numbers, num_layers, head_dim)
        if self.allocate != "uniform":
            losses_k, losses_v = (fitted.tensors[name] for name in LOSSES)
            return allocated_ranks(self.name, losses_k, losses_v, numbers)
        return budget_ranks(self.name, numbers, num_layers, head_dim)

    def _share(self, facts: ModelFacts, context_length: int | None) -> float:
        """What the budget leaves of the layers that are compressed."""
        tokens = facts.max_positions if context_length is None else context_length
        return allowed_nbytes(self, facts, tokens) / facts.compressed_nbytes(tokens)

    def _complete(
        self, rank_k: int | None, rank_v: int | None, numbers: float, num_layers: int, head_dim: int
    ) -> Ranks:
        """One rank is given, the budget pays for the other."""
        given = rank_k if rank_k is not None else rank_v
        assert given is not None
        rest = min(int(numbers + 1e-9) - given, head_dim)
        pair = (given, rest) if rank_k is not None else (rest, given)
        return explicit_ranks(self.name, *pair, num_layers, head_dim)

    # -- the cache -----------------------------------------------------------------------------------------------

    def stored_cache(
        self,
        model: PreTrainedModel,
        fitted: Fitted | None,
        storage: Storage,
        sized: Callable[[int], LowRankPerHead],
        *,
        context_length: int | None = None,
    ) -> KVCache:
        known = self._usable(model, fitted)
        facts = model_facts(model)
        facts.check(self.name, uneven=False)
        if storage is not EXACT and (facts.latent is not None or self.compress_prefill):
            raise UserError(
                f"latents (MLA) and compress_prefill of {self.name} have no quantised storage: leave the quantiser out"
            )
        if facts.latent is not None:
            if facts.others_nbytes(facts.max_positions):
                raise UserError(
                    f"{self.name} keeps one rank of latents at every length, and the share of the layers of "
                    f"{facts.name} that are not compressed depends on the length: use xkv"
                )
            chosen = sized(facts.max_positions)  # the rank of latents does not depend on the length of the context
            ranks = chosen.ranks(known, facts)
            layers = chosen._latent_layers(model, known, ranks)
            return placed(KVCache(layers, context_length=context_length), model).compress_every(self.every)
        # refuses bad ranks before any work is done
        sized(facts.max_positions).ranks(known, facts)
        layer_type, cache_type = (
            (StreamingLatentLayer, StreamingLatentCache) if self.compress_prefill else (LatentLayer, KVCache)
        )
        latent_layers = [
            layer_type(self._pairs_of(model, known, sized, layer), self.sinks, self.window, storage)
            for layer in range(facts.num_layers)
        ]
        return placed(cache_type(latent_layers, context_length=context_length), model).compress_every(self.every)

    def stored_nbytes(self, facts: ModelFacts, fitted: Fitted | None, storage: Storage, tokens: int) -> int:
        assert fitted is not None
        heads, head_dim, dtype = facts.num_key_value_heads, facts.head_dim, facts.dtype
        if facts.latent is not None:
            ranks = self.ranks(fitted, facts)
            numbers = sum(rank + facts.latent.qk_rope_head_dim for rank, _ in ranks)
            return numbers * tokens * dtype.itemsize
        ranks = self.ranks(fitted, facts, tokens)
        exact = min(self.sinks + self.window, tokens)
        latents = sum(
            storage.rows_nbytes(tokens - exact, rank, dtype, SUITED, part=part)
            for rank_pair in ranks
            for part, rank in zip(PARTS, rank_pair, strict=True)
        )
        return heads * (latents + 2 * facts.num_layers * storage.kept_nbytes(exact, head_dim, dtype))

    def entry_layer(self, model: PreTrainedModel, fitted: Fitted | None, storage: Storage, layer: int) -> TwoPhaseLayer:
        known, frame = self._usable(model, fitted), layer_rotation(model, layer).frame
        pairs = self._pairs_of(model, known, lambda tokens: self, layer)
        # merged entries stand in the frame of their layer
        return LatentLayer(lambda tokens: pairs(tokens).framed(frame), self.sinks, self.window, storage)

    def _usable(self, model: PreTrainedModel, fitted: Fitted | None) -> Fitted:
        known = check_fitted(self, model, fitted)
        if self.rope == "pre":
            raise UserError(f"{self.name} with rope: pre is for fidelity studies only: use rope: post for a cache")
        return known

    def _pairs_of(
        self, model: PreTrainedModel, known: Fitted, sized: Callable[[int], LowRankPerHead], layer: int
    ) -> LayerProjections:
        facts = model_facts(model)

        def projections(tokens: int) -> HeadProjections:
            rank_k, rank_v = sized(tokens).ranks(known, facts, tokens)[layer]
            pairs = known.truncated(layer, rank_k, rank_v)
            device = attention_device(model, layer)
            return HeadProjections(*(tensor.to(device, model.dtype).contiguous() for tensor in pairs))

        return projections

    def _latent_layers(self, model: PreTrainedModel, known: Fitted, ranks: Ranks) -> list[ProjectedLatentLayer]:
        if self.sinks or self.window or self.compress_prefill:
            raise UserError(f"{self.name} projects every latent (MLA): leave out sinks, window and compress_prefill")
        layers = []
        for layer, (rank, _) in enumerate(ranks):
            device = attention_device(model, layer)
            pair = (known.tensors[name][layer, 0, :, :rank] for name in ("A", "B"))
            A, B = (tensor.to(device, model.dtype).contiguous() for tensor in pair)
            layers.append(ProjectedLatentLayer(A, B))
        return layers
