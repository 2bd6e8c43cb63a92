from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers.cache_utils import HQQQuantizedLayer

from kvgauge.attend.mask import CAUSAL
from kvgauge.errors import UserError
from kvgauge.layers.cache import KVCache
from kvgauge.methods.transformers_quantized.layer import TransformersQuantizedLayer, live_nbytes

DIM = 32


def filled(tokens=24, batch=2, residual_length=8):
    new_layer = partial(
        HQQQuantizedLayer, nbits=8, axis_key=1, axis_value=1, q_group_size=DIM, residual_length=residual_length
    )
    layer = TransformersQuantizedLayer(new_layer)
    cache = KVCache([layer])
    keys, values = torch.randn(batch, 2, tokens, DIM), torch.randn(batch, 2, tokens, DIM)
    layer.update(keys, values)
    cache.compress()
    return layer, keys, values


def test_bytes_are_codes_scales_and_residual():
    layer, _, _ = filled()
    groups = 2 * 2 * 24  # of keys: a scale and a zero in float32 for each token of a head
    assert layer.nbytes_by_part() == {"codes": 2 * groups * (DIM + 8)}
    rows = torch.randn(2, 2, 3, DIM)
    layer.update(rows, rows)
    assert layer.nbytes_by_part()["residual"] == 2 * rows.nbytes


def test_attention_is_that_of_what_transformers_decodes():
    layer, keys, values = filled()
    rows = torch.randn(2, 2, 1, DIM)
    layer.update(rows, rows)
    query = torch.randn(2, 4, 1, DIM)
    seen = [torch.cat([states, rows], dim=2) for states in (keys, values)]
    weights = (query.unflatten(1, (2, 2)) @ seen[0].unsqueeze(2).mT * DIM**-0.5).softmax(-1)
    expected = (weights @ seen[1].unsqueeze(2)).flatten(1, 2).transpose(1, 2)
    torch.testing.assert_close(layer.attend_compressed(query, CAUSAL, DIM**-0.5), expected, rtol=0.05, atol=0.02)
    torch.testing.assert_close(layer.attend_compressed(query, CAUSAL, DIM**-0.5), expected, rtol=0.05, atol=0.02)
    torch.testing.assert_close(layer.dense()[0], seen[0], rtol=0.05, atol=0.03)


def test_no_decoded_layer_outlives_its_forward_pass():
    layer, _, _ = filled()
    rows = torch.randn(2, 2, 1, DIM)
    layer.update(rows, rows)
    layer.attend_compressed(torch.randn(2, 4, 1, DIM), CAUSAL, 1.0)
    assert live_nbytes(vars(layer).values()) == 0
    assert live_nbytes(vars(layer.inner).values()) == sum(layer.nbytes_by_part().values())


def test_beams_can_be_reordered_but_not_repeated():
    layer, keys, _ = filled()
    layer.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(layer.dense()[0], keys[[1, 0]], rtol=0.05, atol=0.03)
    with pytest.raises(UserError, match="not repeated"):
        layer.batch_repeat_interleave(2)
    with pytest.raises(UserError, match="not repeated"):
        layer.batch_select_indices(torch.tensor([0]))
