"""Linear layers with few rows: the same products in the other order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kvgauge.models.loading import load_model
from kvgauge.models.narrow_linear import MOST_ROWS, NarrowLinear, remove
from pipelines.studies.narrow_products import measure


@pytest.mark.parametrize("shape", [(1,), (2,), (8, 1), (2, 3), (MOST_ROWS,), (MOST_ROWS + 1,), (0,)])
@pytest.mark.parametrize("bias", [True, False])
def test_output_is_that_of_a_linear_layer(shape, bias):
    torch.manual_seed(sum(shape))
    layer = nn.Linear(24, 40, bias=bias)
    rows = torch.randn(*shape, 24)
    expected = rows.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    layer.__class__ = NarrowLinear
    output = layer(rows)
    assert output.is_contiguous()
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_bfloat16_is_as_close_as_a_linear_layer(count, bias):
    torch.manual_seed(count)
    layer = nn.Linear(240, 40, bias=bias, dtype=torch.bfloat16)
    rows = torch.randn(count, 240, dtype=torch.bfloat16)
    exact = rows.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    layer.__class__ = NarrowLinear
    output = layer(rows)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("dtype", "count"), [(torch.bfloat16, 12), (torch.float64, 8)])
def test_the_rest_is_left_to_torch(dtype, count):
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, dtype=dtype)
    rows = torch.randn(count, 24, dtype=dtype)
    expected = layer(rows)
    layer.__class__ = NarrowLinear
    assert torch.equal(layer(rows), expected)


def test_gradients_pass_through():
    torch.manual_seed(1)
    layer = nn.Linear(6, 5)
    rows = torch.randn(4, 6, requires_grad=True)
    layer(rows).square().sum().backward()
    expected, rows.grad = rows.grad.clone(), None
    layer.__class__ = NarrowLinear
    layer(rows).square().sum().backward()
    torch.testing.assert_close(rows.grad, expected)


def test_loaded_models_have_them_and_keep_their_weights():
    model, _ = load_model("tiny/llama")
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert linears and all(isinstance(module, NarrowLinear) for module in linears)
    assert model.get_output_embeddings().weight.shape[0] == model.config.vocab_size
    remove(model)
    assert all(type(module) is nn.Linear for module in linears)


def test_every_way_is_measured():
    model, _ = load_model("tiny/llama")
    (row,) = measure(model, [3], repeats=1)
    assert row["rows"] == 3 and row["gain of W xᵀ"] == pytest.approx(row["x Wᵀ"] / row["W xᵀ"])
    assert row["compiled"] > 0
