"""The best rank-r approximation of a tall or wide matrix, and its storage shared by a group of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from kvgauge.calibration.weighting import Weighting
from kvgauge.store.buffers import GrowingBuffer
from kvgauge.store.storage import EXACT, Storage

# With a discarded energy above this share of the largest eigenvalue, rounding of a float32 moment (6e-8 of the largest
# eigenvalue) moves the reconstruction error by far less than 1e-5 of itself; below it the moment is made in float64.
SAFE_TAIL = 1e-3

PARTIAL = 0.25  # of all eigenvectors: where finding only these stops to be faster than finding all

MOMENT_BLOCKS = 4  # of columns: a symmetric moment is made by rows of blocks, from the diagonal on


@dataclass(frozen=True)
class TruncatedSVD:
    """How the subspace of a prompt is found.

    Attributes:
        randomized: a Gaussian sketch of the moment with power iterations instead of its eigendecomposition: faster for
            ranks far below the features, error a fraction of a percent above the optimum.
        oversampling: directions of the sketch beyond the rank.
        power_iterations: products with the moment beyond the first.
        seed: of the sketch.
    """

    randomized: bool = False
    oversampling: int = 32
    power_iterations: int = 2
    seed: int = 0

    def __call__(self, rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """``rows ≈ basis @ factor.T``, optimal in the Frobenius norm (Eckart–Young), columns by falling energy.

        The smaller of the two moments is decomposed: ``XᵀX`` where tokens outnumber features, else ``XXᵀ``.

        Args:
            rows: X, (tokens, features), float32 or float64.
            rank: at most min(tokens, features).

        Returns:
            basis ``U_r S_r`` (tokens, rank) and factor ``V_r`` (features, rank).
        """
        tokens, features = rows.shape
        if tokens > features:
            factor = self._leading(rows, rank)
            return rows @ factor, factor
        left = self._leading(rows.T, rank)
        factor = rows.T @ left
        norms = factor.norm(dim=0)
        # U Uᵀ X needs no division; the norms only move from the factor to the basis.
        return left * norms, factor / norms.clamp_min(torch.finfo(norms.dtype).tiny)

    def _leading(self, rows: Tensor, rank: int) -> Tensor:
        """The leading eigenvectors (columns, rank) of ``rowsᵀ rows``, largest eigenvalue first."""
        if self.randomized and rank + self.oversampling < rows.shape[1]:
            upper = upper_moment(rows)
            return self._sketch(upper.triu() + upper.triu(1).T, rank)
        moment = upper_moment(rows)
        trace = moment.diagonal().double().sum()
        values, vectors = leading_eigenvectors(moment, rank)
        tail = trace - values.double().clamp_min(0).sum()  # what the discarded directions hold
        if rows.dtype == torch.float32 and tail < SAFE_TAIL * values[-1]:
            vectors = leading_eigenvectors(upper_moment(rows.double()), rank)[1]
        return vectors.flip(-1).to(rows.dtype)

    def _sketch(self, moment: Tensor, rank: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        size = (moment.shape[0], rank + self.oversampling)
        probe = torch.randn(size, generator=generator, dtype=torch.float32).to(moment)
        for _ in range(1 + self.power_iterations):
            probe = torch.linalg.qr(moment @ probe)[0]
        vectors = torch.linalg.eigh(probe.T @ moment @ probe)[1]
        return probe @ vectors[:, -rank:].flip(-1)


def leading_eigenvectors(upper: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues, ascending, and their eigenvectors (features, rank).

    Few of them are found one by one (LAPACK's ``syevr``), which leaves out the others' share of the work; many, and
    those of a matrix on another device, come with all the rest (``syevd``).

    Args:
        upper: a symmetric matrix, of which the upper triangle counts; it may be overwritten.
        rank: at least 1.
    """
    features = upper.shape[0]
    if upper.device.type != "cpu" or rank > PARTIAL * features:
        values, vectors = torch.linalg.eigh(upper, UPLO="U")
        return values[-rank:], vectors[:, -rank:]
    # the transpose of C order is the Fortran order that LAPACK works in: nothing is copied
    found = scipy.linalg.eigh(
        upper.numpy().T,
        lower=True,
        subset_by_index=(features - rank, features - 1),
        driver="evr",
        overwrite_a=True,
        check_finite=False,
    )
    return torch.from_numpy(found[0]), torch.from_numpy(np.ascontiguousarray(found[1]))


def upper_moment(rows: Tensor) -> Tensor:
    """The upper triangle of ``rowsᵀ rows``, in 0.6 of the whole's time; what is below the diagonal is arbitrary."""
    features = rows.shape[1]
    moment = rows.new_zeros(features, features)
    width = -(-features // MOMENT_BLOCKS)
    for start in range(0, features, width):
        stop = min(start + width, features)
        torch.mm(rows[:, start:stop].T, rows[:, start:], out=moment[start:stop, start:])
    return moment


class SharedSubspace:
    """A token basis shared by several layers, and the factors that turn it into the features of each.

    Args:
        layers: that share it.
        weighting: the metric in which the subspace is the best one; None: that of the features themselves.
        normalize: bring the (weighted) features of every layer to the same mean square before they are joined.
        storage: of the basis and the factors.
        part: of `kvgauge.store.storage.PARTS`, whose features they are.

    Attributes:
        basis: (batch, tokens, rank).
        factors: one buffer per layer, (batch, features of the layer, rank).
        scales: (batch, 1, layers), what the features of each layer were divided by; empty where nothing was.
    """

    def __init__(
        self,
        layers: int,
        weighting: Weighting | None = None,
        *,
        normalize: bool = False,
        storage: Storage = EXACT,
        part: str = "values",
    ) -> None:
        self.exact = storage is EXACT
        self.basis = storage.rows(part=part)
        self.factors = [storage.factor() for _ in range(layers)]
        self.scales = GrowingBuffer(step=1)
        self.weighting, self.normalize = weighting, normalize

    def fit(
        self, rows: Sequence[Tensor], valid: Tensor | None, rank_of: Callable[[int], int], svd: TruncatedSVD
    ) -> None:
        """Find the subspace of the concatenated layers, one sequence at a time.

        Args:
            rows: one tensor per layer, (batch, tokens, features).
            valid: (batch, tokens or more), False on padding, which becomes zero and has no part in the subspace.
            rank_of: the rank for a sequence of a number of tokens, clipped here to its tokens and features. A rank
                below that of another sequence leaves columns of zeros.
            svd: how.
        """
        batch, tokens, _ = rows[0].shape
        features = [part.shape[-1] for part in rows]
        lengths = [tokens] * batch
        if valid is not None:
            lengths = valid[:, :tokens].sum(dim=1).tolist()
            rows = _shown(rows, valid)
        ranks = [max(1, min(rank_of(length), length, sum(features))) for length in lengths]
        dtype, rank = rows[0].dtype, max(ranks)
        basis = rows[0].new_zeros(batch, tokens, rank)
        factor = rows[0].new_zeros(batch, sum(features), rank)
        scales = rows[0].new_ones(batch, 1, len(rows), dtype=torch.float32)
        for sequence, (own_rank, length) in enumerate(zip(ranks, lengths, strict=True)):
            parts = [part[sequence].float() if dtype.itemsize < 4 else part[sequence] for part in rows]
            if self.weighting is not None:
                parts = [self.weighting.weighted(part, layer) for layer, part in enumerate(parts)]
            if self.normalize:
                squares = torch.stack([part.square().sum() / (length * part.shape[-1]) for part in parts])
                scales[sequence, 0] = squares.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
                parts = [part / scale for part, scale in zip(parts, scales[sequence, 0], strict=True)]
            left, right = svd(torch.cat(parts, dim=-1), own_rank)
            basis[sequence, :, :own_rank] = left.to(dtype)
            factor[sequence, :, :own_rank] = self._unweighted(right, features, scales[sequence, 0]).to(dtype)
        self.basis.set(basis, None if valid is None else valid[:, :tokens])
        if self.normalize:
            self.scales.set(scales)
        for buffer, part in zip(self.factors, factor.split(features, dim=1), strict=True):
            buffer.set(part)

    def absorb(
        self,
        rows: Sequence[Tensor],
        valid: Tensor | None,
        lengths: Sequence[int],
        rank_of: Callable[[int], int],
        svd: TruncatedSVD,
    ) -> None:
        """Add tokens, and find the subspace of what is stored and of them, at the rank of the longer sequence.

        With orthonormal directions Q of the factors F and of the new tokens X, in the metric, all tokens are
        ``[Z Fᵀ Q; X Q] Qᵀ``: the leading directions of the first matrix, of few columns, are those of all of them
        (Brand, Linear Algebra Appl. 415, 2006). Quantised bases would lose something with every turn: they keep their
        subspace, and new tokens are projected on it (`extend`).

        Args:
            rows, rank_of, svd: as in `fit`.
            valid: (batch, tokens), False on padding among the new tokens; None where there is none.
            lengths: tokens of each sequence in all, padding not counted.
        """
        rows = rows if valid is None else _shown(rows, valid)
        if not self.exact:
            self.extend(rows)
            return
        old, features, dtype = self.basis.dense(), [part.shape[-1] for part in rows], rows[0].dtype
        wide = torch.promote_types(dtype, torch.float32)
        found = []
        for sequence, length in enumerate(lengths):
            joined, factor = self._joined(rows, sequence, wide)
            directions = torch.linalg.qr(torch.cat([factor, joined.T], dim=1))[0]
            core = torch.cat([old[sequence].to(wide) @ (factor.T @ directions), joined @ directions])
            rank = max(1, min(rank_of(length), length, *core.shape))
            basis, turned = svd(core, rank)
            found.append((basis, directions @ turned, sequence))
        rank = max(basis.shape[1] for basis, _, _ in found)
        basis = old.new_zeros(len(found), old.shape[1] + rows[0].shape[1], rank)
        factor = old.new_zeros(len(found), sum(features), rank)
        for left, right, sequence in found:
            basis[sequence, :, : left.shape[1]] = left.to(dtype)
            factor[sequence, :, : left.shape[1]] = self._unweighted(right, features, self._scale(sequence)).to(dtype)
        self.basis.set(basis)
        for buffer, part in zip(self.factors, factor.split(features, dim=1), strict=True):
            buffer.set(part)

    def _joined(self, rows: Sequence[Tensor], sequence: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Tokens (tokens, features of all layers) and factor (features, rank) of a sequence, as the SVD sees them."""
        parts, factors = [], []
        for layer, (part, buffer) in enumerate(zip(rows, self.factors, strict=True)):
            own, factor = part[sequence].to(dtype), buffer.dense()[sequence].to(dtype)
            if self.weighting is not None:
                own, factor = self.weighting.weighted(own, layer), self.weighting.weighted(factor.T, layer).T
            if self.normalize:
                scale = self._scale(sequence)[layer]
                own, factor = own / scale, factor / scale
            parts.append(own)
            factors.append(factor)
        return torch.cat(parts, dim=-1), torch.cat(factors)

    def _scale(self, sequence: int) -> Tensor:
        """What the features of each layer were divided by; only read where they were."""
        return self.scales.view()[sequence, 0] if self.normalize else torch.ones(len(self.factors))

    def _unweighted(self, factor: Tensor, features: Sequence[int], scales: Tensor) -> Tensor:
        """The joined factor (features of all layers, rank) without the weights and scales of its layers."""
        parts = list(factor.split(features))
        if self.normalize:
            parts = [part * scale for part, scale in zip(parts, scales, strict=True)]
        if self.weighting is not None:
            parts = [self.weighting.unweighted(part, layer) for layer, part in enumerate(parts)]
        return torch.cat(parts)

    def extend(self, rows: Sequence[Tensor]) -> None:
        """Add tokens by projection on the subspace in its metric M; `rows` as in `fit`.

        The factors' columns are orthonormal in it, ``Σ_l F_lᵀ M_l F_l = 1``: the projection is ``Σ_l X_l M_l F_l``.
        """
        parts = []
        for layer, (part, factor) in enumerate(zip(rows, self.factors, strict=True)):
            weighted = part
            if self.weighting is not None:
                weighted = self.weighting.weighted(self.weighting.weighted(part.float(), layer), layer)
            if self.normalize:
                weighted = weighted / self.scales.view()[:, :, layer, None].square()
            parts.append(weighted.to(part.dtype) @ factor.dense())
        self.basis.append(torch.stack(parts).sum(dim=0))

    def trim(self) -> None:
        """Give back spare capacity."""
        for buffer in (self.basis, *self.factors):
            buffer.trim()

    def truncated(self, rank: int) -> SharedSubspace:
        """The subspace of the first `rank` directions, which is the best of that rank; for measuring only."""
        other = SharedSubspace(len(self.factors))
        other.basis.set(self.basis.dense()[..., :rank])
        for mine, theirs in zip(other.factors, self.factors, strict=True):
            mine.set(theirs.dense()[..., :rank])
        return other

    def fixed_nbytes(self) -> int:
        """Bytes of the weights, which serve every sequence alike."""
        return 0 if self.weighting is None else self.weighting.nbytes()

    def rebuild(self, layer: int, start: int = 0, stop: int | None = None) -> Tensor:
        """The approximated features (batch, stop − start, features) of one layer."""
        return self.basis.block(start, len(self) if stop is None else stop) @ self.factors[layer].dense().mT

    def __len__(self) -> int:
        return len(self.basis)


def _shown(rows: Sequence[Tensor], valid: Tensor) -> list[Tensor]:
    """Rows (batch, tokens, features), zero where `valid` (batch, tokens or more) is False."""
    return [part * valid[:, : part.shape[1], None].to(part.dtype) for part in rows]
