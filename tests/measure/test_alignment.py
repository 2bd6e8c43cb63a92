"""The measures of alignment against cases with known answers."""

from __future__ import annotations

import pytest
import torch

from kvgauge.errors import UserError
from kvgauge.measure.alignment import alignment, layer_alignment


def orthonormal(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def test_a_shared_basis_behind_rotated_features():
    """The second layer is the first one in other coordinates: subspaces and kernels are equal, tokens are not."""
    basis = orthonormal(200, 4, 0) * torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    first = basis @ orthonormal(32, 4, 1).T
    layers = torch.stack([first, first @ orthonormal(32, 32, 2)])
    measured = alignment(layers, 4)
    assert float(measured["subspace"][0, 1]) == pytest.approx(1.0)
    assert float(measured["cka"][0, 1]) == pytest.approx(1.0)
    assert abs(float(measured["cosine"][0, 1])) < 0.5
    for matrix in measured.values():
        torch.testing.assert_close(matrix.diagonal(), torch.ones(2, dtype=torch.float64))
        torch.testing.assert_close(matrix, matrix.T)


def test_subspaces_at_a_known_angle():
    basis = orthonormal(50, 3, 3)
    turned = basis[:, 0] * 0.6 + basis[:, 2] * 0.8
    first = torch.stack([basis[:, 0] * 5, basis[:, 1]], dim=1)
    second = torch.stack([turned * 5, basis[:, 1]], dim=1)
    measured = alignment(torch.stack([first, second]), 2)
    assert float(measured["subspace"][0, 1]) == pytest.approx((0.36 + 1.0) / 2)
    assert float(alignment(torch.stack([first, second]), 1)["subspace"][0, 1]) == pytest.approx(0.36)


def test_cosine_is_the_mean_over_tokens():
    first = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    second = torch.tensor([[2.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert float(alignment(torch.stack([first, second]), 1)["cosine"][0, 1]) == pytest.approx(0.0)
    assert float(alignment(torch.stack([first, -first]), 1)["cosine"][0, 1]) == pytest.approx(-1.0)


def test_cka_ignores_the_mean_and_the_scale():
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(4))
    measured = alignment(torch.stack([rows, 7 * rows + 100]), 2)
    assert float(measured["cka"][0, 1]) == pytest.approx(1.0, abs=1e-6)


def test_layers_of_a_model(tiny, tokens):
    ids = tokens(2, 60)
    measured = layer_alignment(tiny("tiny/llama"), [ids], rank=8)
    assert set(measured) == {f"{kind}_{name}" for kind in ("keys", "values") for name in ("cosine", "cka", "subspace")}
    assert all(matrix.shape == (4, 4) for matrix in measured.values())
    apart = layer_alignment(tiny("tiny/llama"), ids.split(1), rank=8)
    torch.testing.assert_close(measured["keys_subspace"], apart["keys_subspace"], atol=1e-5, rtol=1e-5)
    assert set(layer_alignment(tiny("tiny/deepseek_v2"), [ids], rank=8)) == {
        "latents_cosine",
        "latents_cka",
        "latents_subspace",
    }


def test_bad_input_is_one_line(tiny, tokens):
    with pytest.raises(UserError, match="outside 1 … 32"):
        layer_alignment(tiny("tiny/llama"), [tokens(1, 60)], rank=33)
    with pytest.raises(UserError, match="no tokens"):
        layer_alignment(tiny("tiny/llama"), [], rank=4)
