"""Whole layers in a storage against attention to what their buffers stand for, in float64."""

from __future__ import annotations

import pytest
import torch

from kvgauge.attend import attention
from kvgauge.attend.mask import CAUSAL, Mask
from kvgauge.layers.cache import KVCache
from kvgauge.layers.exact import ExactLayer
from kvgauge.layers.stored import StoredLayer, whole_layer, whole_nbytes
from kvgauge.store.storage import EXACT, QuantizedStorage

STORAGES = [EXACT, QuantizedStorage(8), QuantizedStorage(4, "token"), QuantizedStorage(3, "channel", group=32)]


def states(heads, tokens, seed):
    return torch.randn(2, heads, tokens, 16, generator=torch.Generator().manual_seed(seed))


def filled(storage, tokens=130):
    layer = StoredLayer(storage)
    KVCache([layer])
    layer.update(states(3, tokens, 1), states(3, tokens, 2))
    layer.compress()
    return layer


@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("storage", STORAGES)
def test_attention_is_that_of_the_stored_rows(storage, queries):
    layer = filled(storage)
    layer.update(states(3, queries, 3), states(3, queries, 4))
    query = states(6, queries, 5)
    actual = layer.attend_compressed(query, CAUSAL, 0.25).double()
    keys, values = (rows.double().repeat_interleave(2, dim=1) for rows in layer.dense())
    scores = query.double() @ keys.mT * 0.25
    later = torch.ones(queries, 130 + queries, dtype=torch.bool).triu(131)
    expected = (scores.masked_fill(later, -torch.inf).softmax(-1) @ values).transpose(1, 2)
    assert float((actual - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("storage", STORAGES)
def test_the_exact_rows_are_gone_and_the_others_counted(storage):
    layer = filled(storage)
    assert set(layer.nbytes_by_part()) == {"keys", "values"}
    assert sum(layer.nbytes_by_part().values()) == 2 * whole_nbytes(storage, 3, 16, torch.float32, 130)


def test_an_exact_storage_needs_no_buffers_of_its_own():
    assert isinstance(whole_layer(EXACT), ExactLayer)
    assert isinstance(whole_layer(QuantizedStorage(4)), StoredLayer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("storage", STORAGES[1:])
def test_one_query_takes_one_compiled_pass_and_gives_what_torch_gives(storage, padded, dtype, monkeypatch):
    layer = StoredLayer(storage)
    KVCache([layer])
    layer.update(states(3, 130, 1).to(dtype), states(3, 130, 2).to(dtype))
    layer.compress()
    layer.update(states(3, 1, 3).to(dtype), states(3, 1, 4).to(dtype))
    query, answers = states(6, 1, 5).to(dtype), []
    mask = CAUSAL
    if padded:
        seen = torch.ones(2, 1, 1, 131, dtype=torch.bool)
        seen[1, ..., :40] = False
        mask = Mask.of(seen)
    kernel = attention.stored_attention
    monkeypatch.setattr(attention, "stored_attention", lambda *given: answers.append(kernel(*given)) or answers[-1])
    compiled = layer.attend_compressed(query, mask, 0.25)
    assert len(answers) == 1 and answers[0] is not None
    monkeypatch.setattr(attention, "stored_attention", lambda *given: None)
    expected = layer.attend_compressed(query, mask, 0.25)
    close = 1e-5 if dtype == torch.float32 else 2e-2
    assert float((compiled - expected).float().norm() / expected.float().norm()) < close


@pytest.mark.parametrize(
    "storage", [EXACT, QuantizedStorage(4, "token", balance=False), QuantizedStorage(3, "channel", 32)]
)
def test_what_is_decoded_is_stored_as_if_it_had_been_in_the_context(storage):
    keys, values = (states(3, 128, seed).half().float() for seed in (1, 2))  # what waits for its group waits in 16 bits
    whole, grown = StoredLayer(storage), StoredLayer(storage)
    for layer, tokens in ((whole, 128), (grown, 64)):
        KVCache([layer])
        layer.update(keys[:, :, :tokens], values[:, :, :tokens])
        layer.compress()
    for token in range(64, 128):
        grown.update(keys[:, :, token : token + 1], values[:, :, token : token + 1])
    grown.compress_again()
    assert grown.nbytes_by_part() == whole.nbytes_by_part()
    for mine, theirs in zip(grown.dense(), whole.dense(), strict=True):
        torch.testing.assert_close(mine, theirs)
