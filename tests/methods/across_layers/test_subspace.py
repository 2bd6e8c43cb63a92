"""The subspace of a group is the optimal one, on the side that is smaller, in float32 as in float64."""

from __future__ import annotations

import pytest
import torch

from kvgauge.calibration.weighting import Weighting
from kvgauge.methods.across_layers.subspace import SharedSubspace, TruncatedSVD, leading_eigenvectors
from kvgauge.store.storage import QuantizedStorage


def matrix(tokens, features, decay, dtype=torch.float32, seed=0):
    """Random singular vectors, singular values from 1 down to `decay`."""
    generator = torch.Generator().manual_seed(seed)
    smaller = min(tokens, features)
    left = torch.linalg.qr(torch.randn(tokens, smaller, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(features, smaller, generator=generator, dtype=torch.float64))[0]
    values = torch.logspace(0, torch.log10(torch.tensor(decay)).item(), smaller, dtype=torch.float64)
    return (left * values @ right.T).to(dtype)


def tail(rows, rank):
    return float(torch.linalg.svdvals(rows.double())[rank:].square().sum().sqrt())


@pytest.mark.parametrize("decay", [0.3, 1e-2, 1e-4])
@pytest.mark.parametrize(("tokens", "features"), [(300, 96), (70, 160), (96, 96)])
@pytest.mark.parametrize("rank", [12, 40])  # a few eigenvectors are found one by one
def test_error_is_the_tail_of_an_explicit_svd(tokens, features, decay, rank):
    rows = matrix(tokens, features, decay)
    basis, factor = TruncatedSVD()(rows, rank)
    error = float((rows.double() - basis.double() @ factor.double().T).norm())
    assert error == pytest.approx(tail(rows, rank), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 5, 16, 17, 64])
def test_leading_eigenvectors_are_those_of_the_upper_triangle(rank):
    generator = torch.Generator().manual_seed(rank)
    half = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    whole = half + half.T
    values, vectors = leading_eigenvectors(whole.triu() + torch.tril(half, -1), rank)
    assert vectors.shape == (64, rank)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(whole)[-rank:])
    torch.testing.assert_close(whole @ vectors, vectors * values, atol=1e-10, rtol=0)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(rank, dtype=torch.float64), atol=1e-10, rtol=0)


@pytest.mark.parametrize("features", [64, 160])  # with 160, the 32 are found one by one
def test_a_steep_spectrum_is_decomposed_in_float64(features):
    rows = matrix(400, features, 10 ** (-features / 8))
    basis, factor = TruncatedSVD()(rows, 32)
    error = float((rows.double() - basis.double() @ factor.double().T).norm())
    in_float32 = torch.linalg.eigh(rows.T @ rows)[1][:, -32:]
    rounded = float((rows.double() - rows.double() @ in_float32.double() @ in_float32.double().T).norm())
    assert error == pytest.approx(tail(rows, 32), rel=1e-3)  # what is stored is float32 still
    assert rounded > 1.01 * tail(rows, 32)  # the moment in float32 would not have been enough


@pytest.mark.parametrize(("tokens", "features"), [(120, 48), (30, 48)])
def test_factor_is_orthonormal_and_ordered(tokens, features):
    basis, factor = TruncatedSVD()(matrix(tokens, features, 0.05), 20)
    torch.testing.assert_close(factor.T @ factor, torch.eye(20), atol=1e-5, rtol=0)
    energies = basis.square().sum(dim=0)
    assert bool((energies[:-1] >= energies[1:] - 1e-6).all())


def test_full_rank_is_exact_on_both_sides():
    for tokens, features in ((50, 24), (24, 50)):
        rows = matrix(tokens, features, 1e-3)
        basis, factor = TruncatedSVD()(rows, 24)
        torch.testing.assert_close(basis @ factor.T, rows, atol=1e-6, rtol=0)


def test_randomized_is_near_the_optimum_and_repeatable():
    rows = matrix(500, 200, 1e-2)
    svd = TruncatedSVD(randomized=True)
    basis, factor = svd(rows, 40)
    error = float((rows - basis @ factor.T).norm())
    assert tail(rows, 40) * (1 - 1e-6) <= error <= 1.01 * tail(rows, 40)
    again = svd(rows, 40)
    assert torch.equal(basis, again[0])
    assert torch.equal(factor, again[1])


def test_ranks_are_clipped_to_tokens_and_features():
    space = SharedSubspace(2)
    rows = [torch.randn(1, 7, 6), torch.randn(1, 7, 6)]
    space.fit(rows, None, lambda tokens: 100, TruncatedSVD())
    assert space.basis.view().shape == (1, 7, 7)
    torch.testing.assert_close(space.rebuild(1), rows[1], atol=1e-5, rtol=0)


def test_padding_has_no_part_in_the_subspace():
    rows = [torch.randn(2, 40, 8), torch.randn(2, 40, 8)]
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, :15] = False
    batch, alone = SharedSubspace(2), SharedSubspace(2)
    rank_of = {40: 9, 25: 5}.__getitem__
    batch.fit(rows, valid, rank_of, TruncatedSVD())
    alone.fit([part[1:, 15:] for part in rows], None, rank_of, TruncatedSVD())
    for layer in range(2):
        torch.testing.assert_close(batch.rebuild(layer)[1, 15:], alone.rebuild(layer)[0], atol=1e-5, rtol=0)
    assert not bool(batch.basis.view()[1, :15].any())


def test_extension_is_the_projection_on_the_subspace():
    rows = [torch.randn(1, 60, 10), torch.randn(1, 60, 10)]
    space = SharedSubspace(2)
    space.fit(rows, None, lambda tokens: 6, TruncatedSVD())
    new = [torch.randn(1, 3, 10), torch.randn(1, 3, 10)]
    space.extend(new)
    W = torch.cat([factor.view()[0] for factor in space.factors])
    expected = torch.cat(new, dim=-1)[0] @ W @ torch.linalg.inv(W.T @ W) @ W.T
    actual = torch.cat([space.rebuild(layer, 60)[0] for layer in range(2)], dim=-1)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def weights(layers, heads, dim, seed):
    """Random metrics (layers, heads, dim, dim), and their roots as a `Weighting`."""
    states = torch.randn(
        layers, heads, 3 * dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    values, vectors = torch.linalg.eigh(states.mT @ states)
    root, inverse = ((vectors * values.pow(power).unsqueeze(-2)) @ vectors.mT for power in (0.5, -0.5))
    return states.mT @ states, Weighting(root.float(), inverse.float())


@pytest.mark.parametrize("tokens", [50, 9])
def test_a_weighted_subspace_is_the_best_in_its_metric(tokens):
    metric, weighting = weights(2, 2, 5, seed=1)
    rows = [torch.randn(1, tokens, 10), torch.randn(1, tokens, 10)]
    space = SharedSubspace(2, weighting)
    space.fit(rows, None, lambda length: 7, TruncatedSVD())
    root = torch.linalg.cholesky(torch.block_diag(*metric.flatten(0, 1)))
    exact = torch.cat(rows, dim=-1)[0].double()
    error = torch.cat([space.rebuild(layer)[0] for layer in range(2)], dim=-1).double() - exact
    best = float(torch.linalg.svdvals(exact @ root)[7:].square().sum().sqrt())
    assert float((error @ root).norm()) == pytest.approx(best, rel=1e-4)
    plain = SharedSubspace(2)
    plain.fit(rows, None, lambda length: 7, TruncatedSVD())
    worse = torch.cat([plain.rebuild(layer)[0] for layer in range(2)], dim=-1).double() - exact
    assert float((worse @ root).norm()) > 1.01 * best


def test_normalised_layers_count_alike_whatever_their_size():
    rows = [torch.randn(1, 60, 8), torch.randn(1, 60, 8)]
    errors = []
    for size in (1.0, 1000.0):
        space = SharedSubspace(2, normalize=True)
        space.fit([rows[0], rows[1] * size], None, lambda length: 5, TruncatedSVD())
        errors.append([float((space.rebuild(i)[0] / f - rows[i][0]).norm()) for i, f in ((0, 1.0), (1, size))])
    assert errors[1] == pytest.approx(errors[0], rel=1e-4)
    exact = torch.cat([part / part.square().mean().sqrt() for part in rows], dim=-1)[0].double()
    best = torch.linalg.svdvals(exact)[5:].square().sum()
    scaled = [error / float(part.square().mean().sqrt()) for error, part in zip(errors[0], rows, strict=True)]
    assert sum(error**2 for error in scaled) == pytest.approx(float(best), rel=1e-4)


@pytest.mark.parametrize("normalize", [False, True])
def test_extension_projects_in_the_metric(normalize):
    metric, weighting = weights(2, 2, 5, seed=2)
    rows = [torch.randn(2, 60, 10), 3 * torch.randn(2, 60, 10)]
    space = SharedSubspace(2, weighting, normalize=normalize)
    space.fit(rows, None, lambda tokens: 6, TruncatedSVD())
    new = [torch.randn(2, 3, 10), torch.randn(2, 3, 10)]
    space.extend(new)
    for sequence in range(2):
        scales = space.scales.view()[sequence, 0].tolist() if normalize else [1.0, 1.0]
        blocks = [block / scales[layer] ** 2 for layer in range(2) for block in metric[layer]]
        M = torch.block_diag(*blocks)
        W = torch.cat([factor.view()[sequence] for factor in space.factors]).double()
        X = torch.cat(new, dim=-1)[sequence].double()
        expected = X @ M @ W @ torch.linalg.inv(W.T @ M @ W) @ W.T
        actual = torch.cat([space.rebuild(layer, 60)[sequence] for layer in range(2)], dim=-1)
        torch.testing.assert_close(actual.double(), expected, atol=1e-4, rtol=1e-4)


def grown(dtype=torch.float32, *, weighting=None, normalize=False):
    """A subspace of two layers with 60 tokens of two sequences, the second 8 tokens shorter, and 24 tokens to come."""
    rows = [torch.stack([matrix(84, 40, 0.05, dtype, seed=layer + 5 * row) for row in (0, 1)]) for layer in (0, 1)]
    valid = torch.ones(2, 84, dtype=torch.bool)
    valid[1, :8] = False
    valid[1, 62:65] = False  # padding between a context and its question
    space = SharedSubspace(2, weighting, normalize=normalize)
    space.fit([part[:, :60] for part in rows], valid[:, :60], lambda length: 10, TruncatedSVD())
    return space, rows, valid


def as_the_svd_sees_them(space, parts, row):
    """Rows or factors of both layers, joined, in float64 and in the metric."""
    joined = []
    for layer, part in enumerate(parts):
        part = part.double()
        if space.weighting is not None:
            part = space.weighting.weighted(part, layer)
        joined.append(part / space.scales.view()[row, 0, layer] if space.normalize else part)
    return torch.cat(joined, dim=-1)


@pytest.mark.parametrize("rank", [10, 17, 30, 80])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_absorbed_tokens_and_stored_ones_get_the_best_subspace_of_both(rank, normalize, weighted):
    weighting = None
    if weighted:
        generator = torch.Generator().manual_seed(9)
        roots = torch.randn(2, 5, 8, 8, generator=generator)
        roots = roots @ roots.mT / 8 + 0.5 * torch.eye(8)
        weighting = Weighting(roots, torch.linalg.inv(roots))
    space, rows, valid = grown(weighting=weighting, normalize=normalize)
    stored = [space.rebuild(layer) for layer in (0, 1)]
    new = [part[:, 60:] for part in rows]
    space.absorb(new, valid[:, 60:], valid.sum(dim=1).tolist(), lambda length: rank, TruncatedSVD())
    assert space.basis.dense().shape == (2, 84, min(rank, 10 + 24))
    for row in (0, 1):
        before = as_the_svd_sees_them(space, [part[row] for part in stored], row)
        came = as_the_svd_sees_them(space, [part[row] for part in new], row) * valid[row, 60:, None]
        everything = torch.cat([before, came])
        now = as_the_svd_sees_them(space, [space.rebuild(layer)[row] for layer in (0, 1)], row)
        error = float((everything - now).norm())
        assert error == pytest.approx(tail(everything, rank), rel=1e-4, abs=2e-6 * float(everything.norm()))
        factor = torch.cat([buffer.dense()[row].T.reshape(-1, 40) for buffer in space.factors], dim=-1)
        seen = as_the_svd_sees_them(space, factor.split(40, dim=-1), row)
        torch.testing.assert_close(seen @ seen.T, torch.eye(len(seen), dtype=torch.float64), atol=1e-4, rtol=0)


def test_ranks_go_by_the_tokens_of_each_sequence():
    space, rows, valid = grown()
    space.absorb(
        [part[:, 60:] for part in rows],
        valid[:, 60:],
        [84, 73],
        lambda length: 12 if length < 80 else 20,
        TruncatedSVD(),
    )
    assert [int((part != 0).any(dim=0).sum()) for part in space.basis.dense()] == [20, 12]
    assert not space.basis.dense()[1, 62:65].any()


def test_quantised_tokens_keep_their_subspace():
    rows = [matrix(84, 40, 0.05, seed=layer)[None] for layer in (0, 1)]
    space = SharedSubspace(2, storage=QuantizedStorage(8))
    space.fit([part[:, :60] for part in rows], None, lambda length: 10, TruncatedSVD())
    factors = [buffer.dense() for buffer in space.factors]
    space.absorb([part[:, 60:] for part in rows], None, [84], lambda length: 20, TruncatedSVD())
    assert space.basis.dense().shape == (1, 84, 10)
    projected = torch.cat([part[0, 60:] for part in rows], dim=-1) @ torch.cat([part[0] for part in factors])
    torch.testing.assert_close(space.basis.dense()[0, 60:], projected, atol=2e-2 * float(projected.abs().max()), rtol=0)
