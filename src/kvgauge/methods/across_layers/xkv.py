"""xKV (arXiv 2503.18893): one low-rank subspace for the keys of a group of layers, and one for their values.

Single SVD, the paper's within-layer baseline, is the same with ``group_size: 1``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.architecture.facts import ModelFacts, attention_device, model_facts
from kvgauge.architecture.frequencies import layer_plane_rotations
from kvgauge.architecture.planes import BLOCK
from kvgauge.architecture.prompt_length import prompt_length
from kvgauge.calibration.allocation import LOSSES, check_allocation, held_out, spend
from kvgauge.calibration.weighting import Weighting
from kvgauge.calibration.whitening import output_moments, roots, score_metrics, value_weighting
from kvgauge.contract.budget import allowed_nbytes, check_reached
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.fitting import check_fitted, fit_metadata
from kvgauge.contract.method import Method, Needs, plain_label
from kvgauge.contract.roles import Lossless, Projector
from kvgauge.errors import UserError, unknown
from kvgauge.layers.building import placed
from kvgauge.layers.cache import KVCache, LayerCache
from kvgauge.layers.mla import ExactLatentLayer
from kvgauge.layers.stored import whole_layer, whole_nbytes
from kvgauge.layers.two_phase import TwoPhaseLayer
from kvgauge.methods.across_layers.group import CrossLayerGroup, CrossLayerSettings
from kvgauge.methods.across_layers.group_losses import energy_losses, greedy_losses
from kvgauge.methods.across_layers.latent_group import CrossLayerLatentGroup
from kvgauge.methods.across_layers.ranks import group_ranks, split
from kvgauge.methods.across_layers.selection import ChunkSelection
from kvgauge.methods.across_layers.subspace import TruncatedSVD
from kvgauge.methods.across_layers.uniform import layer_range
from kvgauge.store.storage import EXACT, PARTS, Storage

if TYPE_CHECKING:
    from kvgauge.calibration.moments import Moments

AllRanks = Callable[[int], list[tuple[int, int]]]  # tokens of a context → (rank_k, rank_v) of every group


@dataclass(frozen=True, kw_only=True)
class XKV(Projector, Lossless, Method):
    """Truncated SVD of the concatenated caches of `group_size` layers, per prompt, at the end of the prefill.

    Models with multi-head latent attention (MLA) have one subspace per group, of their latents, which are keys and
    values at once and carry no rotation; the rotary keys stay exact. `rank` is the rank of the latents there.

    Explicit ranks come before the budget. A rank is clipped to the tokens of the prompt, and to the features of a last
    group that is smaller than the others. Every group keeps at least rank 1: a context that is too short for its
    factors to pay is refused.

    Attributes:
        group_size: G, layers that share a subspace; the last group may be smaller.
        rank: rank of the keys and of the values of a group, or of its latents.
        rank_k, rank_v: ranks of the keys and of the values of a group, instead of `rank`.
        key_share: part of the ranks that a budget gives to the keys; 0.4 is the paper's 512 : 768.
        rope: ``pre`` works on keys before the rotation, as the paper: they are rebuilt and rotated at every step;
            ``post`` on keys as they are cached: nothing is rebuilt, and more rank is needed.
        start_layer, end_layer: first and last compressed layer, both included; the others stay exact. A budget
            counts the exact ones.
        sr: Selective Reconstruction, ``{chunk: tokens per landmark, budget: tokens rebuilt per step}``; None attends to
            everything. It applies to steps of one token; the landmarks count in the budget.
        fold_every: project the decoded tokens on the subspace, so many at a time; None keeps them exact. With
            `while_decoding` the subspace itself is found again, of all tokens and at the rank of the longer sequence;
            quantised ones are projected on.
        svd: ``exact`` or ``randomized`` (see `TruncatedSVD`).
        seed: of the randomized SVD.
        whiten: ``{keys: bool, values: bool}``, the metric of the SVD: for values the error that W_O makes of theirs,
            for keys that of the scores of calibration queries, which `fit` learns (`kvgauge.calibration.whitening`).
            None and what is left out: the error of the features themselves. What is stored has the same form.
        normalize: ``layer`` brings the layers of a group to the same mean square before they are joined; ``none``.
        sinks: first tokens that stay exact, outside the subspaces; their bytes count in the budget.
        allocate: how a budget is split over groups and over keys and values: ``uniform``: every group the same share,
            the keys `key_share` of it; ``energy``: by the discarded energy of scores and of V W_O; ``greedy``: by the
            error of attention outputs (`kvgauge.calibration.allocation`). Losses are those of held-out sequences, which
            `fit` learns: the ranks, and so the bytes, are then known before the prompt is, and the layers are
            compressed one group after the other; a prompt's own spectra would need all groups at once.

    Raises:
        UserError: values that contradict each other or are out of range.
    """

    name: str = "xkv"
    group_size: int = 4
    rank: int | None = None
    rank_k: int | None = None
    rank_v: int | None = None
    key_share: float = 0.4
    rope: str = "pre"
    start_layer: int = 0
    end_layer: int | None = None
    sr: Mapping[str, int] | None = None
    fold_every: int | None = None
    svd: str = "exact"
    seed: int = 0
    whiten: Mapping[str, bool] | None = None
    normalize: str = "none"
    sinks: int = 0
    allocate: str = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 1:
            raise UserError(f"group_size {self.group_size} of {self.name} is below 1: a group has at least one layer")
        if (self.rank_k is None) != (self.rank_v is None):
            raise UserError(f"{self.name} has one of rank_k and rank_v: give both, or a budget")
        if self.rank is not None and self.rank_k is not None:
            raise UserError(f"{self.name} has rank beside rank_k and rank_v: give one or the other")
        if self.rank is None and self.rank_k is None and self.budget is None:
            raise UserError(f"{self.name} needs a budget, a rank, or rank_k and rank_v")
        for label in ("rank", "rank_k", "rank_v", "fold_every"):
            value = getattr(self, label)
            if value is not None and value < 1:
                raise UserError(f"{label} {value} of {self.name} is below 1")
        if not 0.0 < self.key_share < 1.0:
            raise UserError(f"key_share {self.key_share:g} of {self.name} is outside (0, 1): the paper's is 0.4")
        if self.rope not in ("pre", "post"):
            raise UserError(f"rope of {self.name} is `pre` or `post`, not {self.rope!r}")
        if self.svd not in ("exact", "randomized"):
            raise UserError(f"svd of {self.name} is `exact` or `randomized`, not {self.svd!r}")
        for key in self.whiten or ():
            if key not in ("keys", "values"):
                raise unknown(f"field of whiten of {self.name}", str(key), ("keys", "values"))
        if self.normalize not in ("layer", "none"):
            raise UserError(f"normalize of {self.name} is `layer` or `none`, not {self.normalize!r}")
        if self.sinks < 0:
            raise UserError(f"sinks {self.sinks} of {self.name} is below 0: it is a number of tokens")
        if self.fold_every is not None and self.every is not None:
            raise UserError(f"{self.name} has fold_every beside while_decoding: give one of them")
        given = [label for label in ("rank", "rank_k", "rank_v") if getattr(self, label) is not None]
        check_allocation(self.name, self.allocate, given[0] if given else None)
        self.selection()

    @property
    def learns(self) -> bool:
        """The plain method needs no fit."""
        return self.whitened("keys") or self.allocate != "uniform"

    @property
    def needs(self) -> Needs:
        if not self.learns:
            return Needs()
        learnt: dict[str, Any] = {"rope": self.rope, "sinks": self.sinks}
        if self.allocate != "uniform":
            names = ("allocate", "group_size", "start_layer", "end_layer", "normalize", "svd", "seed")
            learnt |= {name: getattr(self, name) for name in names}
            learnt["whiten"] = {part: self.whitened(part) for part in ("keys", "values")}
        return Needs(learns=learnt)

    def whitened(self, part: str) -> bool:
        """Whether the SVD of the ``keys`` or of the ``values`` is weighted."""
        return bool((self.whiten or {}).get(part, False))

    @property
    def combination(self) -> bool:
        return self.whiten is not None or self.allocate != "uniform" or self.normalize != "none"

    @property
    def label(self) -> str:
        if self.rank is not None:
            return f"{self.name}@r{self.rank}"
        return plain_label(self) if self.rank_k is None else f"{self.name}@r{self.rank_k},{self.rank_v}"

    def selection(self) -> ChunkSelection | None:
        """`sr`, validated.

        Raises:
            UserError: unknown or missing keys, or values out of range.
        """
        if self.sr is None:
            return None
        for key in self.sr:
            if key not in ("chunk", "budget"):
                raise unknown(f"field of sr of {self.name}", str(key), ("chunk", "budget"))
        chunk, budget = self.sr.get("chunk", 16), self.sr.get("budget", 512)
        if not 1 <= chunk <= min(budget, BLOCK):
            raise UserError(
                f"sr of {self.name} has chunk {chunk} and budget {budget}: a chunk has 1 … {BLOCK} tokens, "
                f"the budget is at least one chunk"
            )
        if self.fold_every is not None and self.fold_every % chunk:
            raise UserError(f"fold_every {self.fold_every} of {self.name} is not a multiple of sr's chunk {chunk}")
        return ChunkSelection(chunk, budget)

    def lossless(self, facts: ModelFacts) -> XKV:
        features = self.group_size * facts.num_key_value_heads * facts.head_dim
        exact = replace(self, rank=features, rank_k=None, rank_v=None, allocate="uniform")
        return replace(exact, sr=None, fold_every=None, svd="exact")

    # -- ranks ---------------------------------------------------------------------------------------------------

    def groups(self, num_layers: int) -> list[range]:
        """The layers of every group.

        Raises:
            UserError: layers out of range, or a group larger than what is compressed.
        """
        layers = layer_range(self.name, self.start_layer, self.end_layer, num_layers)
        if self.group_size > len(layers):
            raise UserError(
                f"group_size {self.group_size} of {self.name} is larger than the {len(layers)} layers to compress"
            )
        return [layers[start : start + self.group_size] for start in range(0, len(layers), self.group_size)]

    def ranks(self, facts: ModelFacts, tokens: int, fitted: Fitted | None = None) -> list[tuple[int, int]]:
        """(rank_k, rank_v) of every group for a context of `tokens` tokens; the same rank twice with MLA's latents.

        Args:
            facts: of the model.
            tokens: of the context, sinks included.
            fitted: holds the losses that an allocation needs.

        Raises:
            UserError: the exact layers alone exceed the budget, the smallest ranks exceed it, or a rank exceeds the
                features of a group.
        """
        groups = self.groups(facts.num_layers)
        width = facts.num_key_value_heads * facts.head_dim
        if facts.latent is not None and self.rank_k is not None:
            raise UserError(f"rank_k and rank_v of {self.name}: this model has one latent (MLA), give rank instead")
        given = (self.rank, self.rank) if self.rank_k is None or self.rank_v is None else (self.rank_k, self.rank_v)
        if given[0] is not None and given[1] is not None:
            most = self.group_size * width
            if max(given[0], given[1]) > most:
                raise UserError(
                    f"rank {max(given[0], given[1])} of {self.name} is above the {most} features of {self.group_size} "
                    f"layers: give a rank from 1 to {most}"
                )
            return [(given[0], given[1])] * len(groups)
        ranks = self._bought_ranks(facts, tokens, fitted)
        check_reached(self, facts, tokens, self._nbytes_at(facts, EXACT, tokens, ranks))
        return ranks

    def _bought_ranks(self, facts: ModelFacts, tokens: int, fitted: Fitted | None) -> list[tuple[int, int]]:
        """The ranks that the budget pays for; at least 1, whether it does or not."""
        groups, width = self.groups(facts.num_layers), facts.num_key_value_heads * facts.head_dim
        tokens -= (exact := self._exact_tokens(tokens))
        numbers = self._affordable(facts, tokens, exact)
        features = [len(group) * width for group in groups]
        if facts.latent is not None:
            return [(rank, rank) for rank in group_ranks(numbers, tokens, features)]
        limits = [max(1, min(tokens, size)) for size in features]
        if self.allocate != "uniform":
            assert fitted is not None
            parts = [zip(fitted.tensors[loss], limits, strict=True) for loss in LOSSES]
            curves = [curve[: limit + 1] for part in parts for curve, limit in part]
            ranks = spend(curves, [float(tokens + size) for size in features] * 2, numbers)
            return list(zip(ranks[: len(groups)], ranks[len(groups) :], strict=True))
        totals = group_ranks(numbers, tokens, features, subspaces=2)
        return [split(total, limit, self.key_share) for total, limit in zip(totals, limits, strict=True)]

    def _exact_tokens(self, tokens: int) -> int:
        """Sinks of a context: at least one token is left for the subspace."""
        return min(self.sinks, tokens - 1)

    def _affordable(self, facts: ModelFacts, tokens: int, sinks: int) -> float:
        """Numbers of all bases and factors together that the budget pays for, after what is exact or a landmark."""
        compressed = sum(len(group) for group in self.groups(facts.num_layers))
        exact = (facts.num_layers - compressed) * facts.cached_width
        if facts.latent is not None:
            exact += compressed * facts.latent.qk_rope_head_dim
        everything = facts.num_layers * facts.cached_width
        numbers = allowed_nbytes(self, facts, tokens + sinks) / facts.dtype.itemsize
        numbers -= exact * tokens + everything * sinks
        selection = self.selection()
        if selection is not None:
            numbers -= selection.count(tokens) * facts.num_key_value_heads * facts.head_dim * compressed
        if self.normalize == "layer":
            numbers -= 2 * compressed * torch.float32.itemsize / facts.dtype.itemsize
        if numbers <= 0:
            raise UserError(
                f"budget {self.budget:g} of {self.name} does not pay for what stays exact (layers outside "
                f"start_layer … end_layer, sinks, rotary keys of MLA) and for landmarks: compress more or raise it"
            )
        return numbers

    # -- fitting -------------------------------------------------------------------------------------------------

    def fit(self, moments: Moments, model: PreTrainedModel) -> Fitted | None:
        """The metric of the keys, and the losses that an allocation needs; None where there is neither.

        ``root_k`` and ``inverse_k`` are those of `Weighting`, ``loss_k`` and ``loss_v`` (groups, largest rank + 1).

        Raises:
            UserError: the moments are another model's or have no held-out sequences for an allocation, or the model has
                no keys of its own (MLA).
        """
        if not self.learns:
            return None
        moments.check(model)
        self._check_latent(model_facts(model))
        model_facts(model).check(self.name, uneven=False)
        with prompt_length(model, moments.sequence_length):
            metric = score_metrics(moments, model, self.rope, self.sinks)
            root, inverse, floored = roots(metric)
            tensors = {"root_k": root.float(), "inverse_k": inverse.float()}
            if self.allocate != "uniform":
                tensors |= dict(zip(LOSSES, self._losses(moments, model, tensors, metric), strict=True))
        return Fitted(tensors, fit_metadata(self, moments, model, floored_eigenvalues={"keys": floored}))

    def _losses(
        self, moments: Moments, model: PreTrainedModel, known: Mapping[str, Tensor], metric: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Losses of keys and of values of every group, see `kvgauge.methods.across_layers.group_losses`."""
        sequences, groups = held_out(self.name, moments), self.groups(model_facts(model).num_layers)
        everything = self.group_size * metric.shape[1] * metric.shape[2]
        new_groups = partial(self._new_groups, model, known, lambda tokens: [(everything, everything)] * len(groups))
        if self.allocate == "greedy":
            return greedy_losses(new_groups, groups, model, sequences)
        return energy_losses(new_groups, groups, model, sequences, (metric, output_moments(model)))

    def _check_latent(self, facts: ModelFacts) -> None:
        """Refuse what latents that are keys and values at once (MLA) have no use for."""
        if facts.latent is None:
            return
        if self.sr is not None:
            raise UserError(f"sr of {self.name} saves rebuilding keys, and with latents (MLA) none are: leave it out")
        if self.learns or self.whitened("values") or self.normalize != "none" or self.sinks:
            raise UserError(f"{self.name} with latents (MLA) has no whiten, normalize, sinks, allocate: leave them out")

    # -- the cache -----------------------------------------------------------------------------------------------

    def stored_cache(
        self,
        model: PreTrainedModel,
        fitted: Fitted | None,
        storage: Storage,
        sized: Callable[[int], XKV],
        *,
        context_length: int | None = None,
    ) -> KVCache:
        facts = model_facts(model)
        facts.check(self.name, uneven=False)
        self._check_latent(facts)
        known = check_fitted(self, model, fitted) if self.learns else None
        # refuses what cannot work before any work is done
        sized(facts.max_positions).ranks(facts, facts.max_positions, known)
        latent = facts.latent is not None
        if storage is not EXACT and latent:
            raise UserError(f"latents (MLA) of {self.name} have no quantised storage: leave the quantiser out")
        layers: list[LayerCache] = [
            ExactLatentLayer() if latent else whole_layer(storage) for _ in range(facts.num_layers)
        ]
        ranks = cache(lambda tokens: sized(tokens).ranks(facts, tokens, known))
        if latent:
            members: Iterable[Sequence[LayerCache]] = self._latent_members(facts, ranks)
        else:
            tensors = {} if known is None else known.tensors
            members = [group.members for group in self._new_groups(model, tensors, ranks, storage)]
        for group, joined in zip(self.groups(facts.num_layers), members, strict=True):
            layers[group.start : group.stop] = joined
        turning = self.rope == "pre" and not latent
        whole = placed(KVCache(layers, context_length=context_length), model, turning=turning)
        return whole.compress_every(self.every)

    def _new_groups(
        self, model: PreTrainedModel, known: Mapping[str, Tensor], ranks: AllRanks, storage: Storage = EXACT
    ) -> list[CrossLayerGroup]:
        """Empty groups; `known` as in `fit`."""
        settings = CrossLayerSettings(
            fold_every=self.fold_every,
            selection=self.selection(),
            svd=self.truncated_svd(),
            sinks=self.sinks,
            normalize=self.normalize == "layer",
            storage=storage,
        )
        keys = values = None
        if self.whitened("keys"):
            keys = Weighting(known["root_k"], known["inverse_k"])
        if self.whitened("values"):
            values = value_weighting(model)
        made, rotations = [], layer_plane_rotations(model) if self.rope == "pre" else None
        for index, group in enumerate(self.groups(model_facts(model).num_layers)):
            device = attention_device(model, group[0])
            weights = [None if one is None else one.part(group).to(device) for one in (keys, values)]
            own = partial(self._group_ranks, ranks, index)
            turned = None if rotations is None else [rotations[layer] for layer in group]
            made.append(CrossLayerGroup(len(group), own, settings, (weights[0], weights[1]), turned))
        return made

    def _latent_members(self, facts: ModelFacts, ranks: AllRanks) -> Iterator[Sequence[LayerCache]]:
        for index, group in enumerate(self.groups(facts.num_layers)):
            rank = partial(self._latent_rank, ranks, index)
            yield CrossLayerLatentGroup(len(group), rank, self.truncated_svd(), self.fold_every).members

    def truncated_svd(self) -> TruncatedSVD:
        """How the subspaces are found."""
        return TruncatedSVD(randomized=self.svd == "randomized", seed=self.seed)

    def _group_ranks(self, ranks: AllRanks, group: int, tokens: int) -> tuple[int, int]:
        return ranks(tokens + self.sinks)[group]

    @staticmethod
    def _latent_rank(ranks: AllRanks, group: int, tokens: int) -> int:
        return ranks(tokens)[group][0]

    def stored_nbytes(self, facts: ModelFacts, fitted: Fitted | None, storage: Storage, tokens: int) -> int:
        return self._nbytes_at(facts, storage, tokens, self.ranks(facts, tokens, fitted))

    def _nbytes_at(self, facts: ModelFacts, storage: Storage, tokens: int, ranks: Sequence[tuple[int, int]]) -> int:
        """Bytes of one sequence at the given ranks of every group."""
        heads, head_dim, dtype = facts.num_key_value_heads, facts.head_dim, facts.dtype
        groups, width, sinks = self.groups(facts.num_layers), heads * head_dim, self._exact_tokens(tokens)
        compressed, rest = sum(map(len, groups)), tokens - sinks
        parts = 2
        if facts.latent is None:
            size = (facts.num_layers - compressed) * whole_nbytes(storage, heads, head_dim, dtype, tokens)
        else:  # one subspace a group, and the rotary keys
            parts, rotary = 1, facts.latent.qk_rope_head_dim
            size = ((facts.num_layers - compressed) * width + facts.num_layers * rotary) * tokens * dtype.itemsize
        for group, given in zip(groups, ranks, strict=True):
            for part, wanted in zip(PARTS[:parts], given, strict=False):
                rank = max(1, min(wanted, rest, len(group) * width))
                size += storage.rows_nbytes(rest, rank, dtype, part=part)
                size += len(group) * storage.factor_nbytes(width, rank, dtype)
        size += compressed * parts * heads * storage.kept_nbytes(sinks, head_dim, dtype)
        selection = self.selection()
        if selection is not None:
            size += compressed * heads * storage.kept_nbytes(selection.count(rest), head_dim, dtype)
        return size + (parts * compressed * torch.float32.itemsize if self.normalize == "layer" else 0)

    def entry_layer(self, model: PreTrainedModel, fitted: Fitted | None, storage: Storage, layer: int) -> TwoPhaseLayer:
        raise UserError(
            f"{self.name} joins layers token by token, and every layer has merged other tokens: "
            f"compose the merger with a method that works per layer, e.g. kqsvd"
        )
