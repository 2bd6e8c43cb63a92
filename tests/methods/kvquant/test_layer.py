"""KVQuant's attention against the dense formula: decode all, rotate at the true positions, one softmax."""

from __future__ import annotations

import pytest
import torch

from kvgauge.architecture.planes import BLOCK, PlaneRotation
from kvgauge.attend.mask import CAUSAL, Mask
from kvgauge.methods.kvquant.grid import ChannelGrid, TokenGrid
from kvgauge.methods.kvquant.layer import EXACT_BITS, KVQuantCache, KVQuantLayer, LayerQuantiser
from kvgauge.methods.kvquant.layout import key_rows, value_rows

HEADS, GROUPS, DIM = 2, 3, 8
WIDTH = HEADS * DIM
FREQUENCIES = 10_000.0 ** -(torch.arange(DIM // 2) / (DIM / 2))


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def quantiser(pre_rope=True, sinks=2, outliers=0.1):
    levels = {bits: torch.linspace(-1, 1, 2**bits) for bits in (2, 3, 4)}
    bound = torch.full((WIDTH,), 1.6)
    return LayerQuantiser(
        keys=ChannelGrid(-bound, bound, sparse=outliers > 0),
        values=TokenGrid(outliers, WIDTH),
        key_levels=levels,
        value_levels=levels,
        rotation=PlaneRotation(FREQUENCIES) if pre_rope else None,
        sinks=sinks,
        outlier_dtype=torch.float16,
    )


def states(tokens, batch=1, heads=HEADS):
    return torch.randn(batch, heads, tokens, DIM)


def rotate(x, positions):
    """The rotation of the halves of a head, written out in float64."""
    angles = positions.double()[..., None] * FREQUENCIES.double()
    first, second = x.double().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def decoded(grid, levels, rows):
    """Rows (1, tokens, width) as the codes stand for them, entry by entry."""
    measured = grid.measure(rows)
    nearest = levels[(measured.normalised[..., None] - levels).abs().argmin(-1)]
    scales = None if measured.scales is None else measured.scales
    back = grid.restore(nearest, scales)
    return back if measured.outliers is None else torch.where(measured.outliers, rows.half().float(), back)


def oracle(query, keys, values, made_of, bits, context):
    """Softmax attention of the last queries in float64; keys post-RoPE at positions 0, 1, …"""
    positions = torch.arange(keys.shape[2])
    sinks = made_of.sinks
    if made_of.rotation is None:
        coded = decoded(made_of.keys, made_of.key_levels[bits], value_rows(keys))
        rebuilt = coded.unflatten(-1, (HEADS, DIM)).transpose(1, 2).double()
    else:
        unrotated = rotate(keys, -positions)
        planes = torch.stack(unrotated.chunk(2, dim=-1), dim=-1).flatten(-2)  # the two of a plane side by side
        coded = decoded(made_of.keys, made_of.key_levels[bits], value_rows(planes).float())
        pairs = coded.unflatten(-1, (HEADS, DIM // 2, 2)).double()
        rebuilt = rotate(torch.cat([pairs[..., 0], pairs[..., 1]], dim=-1).transpose(1, 2), positions)
    mixed = decoded(made_of.values, made_of.value_levels[bits], value_rows(values))
    mixed = mixed.unflatten(-1, (HEADS, DIM)).transpose(1, 2).double()
    rebuilt[:, :, :sinks], mixed[:, :, :sinks] = keys[:, :, :sinks].double(), values[:, :, :sinks].double()
    grouped = query.double().unflatten(1, (HEADS, GROUPS))
    scores = grouped @ rebuilt.unsqueeze(2).mT * DIM**-0.5
    count = query.shape[2]
    seen = torch.arange(keys.shape[2]) <= torch.arange(context, context + count)[:, None]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ mixed.unsqueeze(2)).flatten(1, 2).transpose(1, 2)


def filled(layer, keys, values, context):
    cache = KVQuantCache([layer])
    layer.update(keys[:, :, :context], values[:, :, :context])
    cache.compress()
    layer.update(keys[:, :, context:], values[:, :, context:])
    return cache


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("pre_rope", [True, False])
@pytest.mark.parametrize(("sinks", "outliers"), [(2, 0.1), (0, 0.0), (1, 0.0), (0, 0.1)])
def test_attention_is_that_of_the_decoded_keys_and_values(bits, pre_rope, sinks, outliers):
    context, new = BLOCK + 30, 3
    made_of = quantiser(pre_rope, sinks, outliers)
    keys, values, query = states(context + new), states(context + new), states(new, heads=HEADS * GROUPS)
    layer = KVQuantLayer(made_of, bits)
    filled(layer, keys, values, context)
    actual = layer.attend_compressed(query, CAUSAL, DIM**-0.5)
    expected = oracle(query, keys, values, made_of, bits, context)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-3, atol=2e-4)


def test_the_dense_view_is_what_attention_sees():
    made_of = quantiser()
    keys, values, query = states(90), states(90), states(1, heads=HEADS * GROUPS)
    layer = KVQuantLayer(made_of, 4)
    filled(layer, keys, values, 80)
    seen_keys, seen_values = layer.dense()
    grouped = query.unflatten(1, (HEADS, GROUPS))
    weights = (grouped @ seen_keys.unsqueeze(2).mT * DIM**-0.5).softmax(-1)
    expected = (weights @ seen_values.unsqueeze(2)).flatten(1, 2).transpose(1, 2)
    torch.testing.assert_close(layer.attend_compressed(query, CAUSAL, DIM**-0.5), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(seen_keys[:, :, :2], keys[:, :, :2])


def test_more_bits_are_nearer():
    keys, values = states(200), states(200)
    errors = []
    for bits in (2, 3, 4, EXACT_BITS):
        layer = KVQuantLayer(quantiser(sinks=0), bits)
        filled(layer, keys, values, 200 - 1)
        errors.append(float((layer.dense()[0] - keys).norm() / keys.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5 < errors[-2]


def test_keys_turn_back_and_forth():
    keys, positions = states(50), torch.arange(50)[None] + 7
    rows = key_rows(keys, positions, PlaneRotation(FREQUENCIES))
    planes = torch.stack(rotate(keys, -positions[0]).chunk(2, dim=-1), dim=-1).flatten(-2)
    torch.testing.assert_close(rows.double(), value_rows(planes), rtol=1e-4, atol=1e-5)


def test_a_context_shorter_than_the_sinks_goes_on_exact_until_they_are_full():
    keys, values = states(12), states(12)
    layer = KVQuantLayer(quantiser(sinks=8), 2)
    filled(layer, keys, values, 5)
    seen_keys, seen_values = layer.dense()
    assert torch.equal(seen_keys[:, :, :8], keys[:, :, :8])
    assert torch.equal(seen_values[:, :, :8], values[:, :, :8])
    assert len(layer.key_rows) == 4


def test_a_padded_row_shorter_than_the_sinks_counts_each_token_once():
    """The row alone, and behind padding beside a longer one, attends alike."""
    made_of = quantiser(sinks=4)
    keys, values, query = states(9, batch=2), states(9, batch=2), states(1, batch=2, heads=HEADS * GROUPS)
    layer = KVQuantLayer(made_of, EXACT_BITS)
    cache = KVQuantCache([layer])
    cache.valid = torch.ones(2, 8, dtype=torch.bool)
    cache.valid[1, :6] = False
    layer.update(keys[:, :, :8], values[:, :, :8])
    cache.compress()
    layer.update(keys[:, :, 8:], values[:, :, 8:])
    mask = torch.cat([cache.valid, torch.ones(2, 1, dtype=torch.bool)], dim=1)[:, None, None]
    actual = layer.attend_compressed(query, Mask.of(mask), DIM**-0.5)
    grouped = query.unflatten(1, (HEADS, GROUPS))
    scores = (grouped @ keys.unsqueeze(2).mT * DIM**-0.5).masked_fill(~mask[:, :, None], -torch.inf)
    expected = (scores.softmax(-1) @ values.unsqueeze(2)).flatten(1, 2).transpose(1, 2)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bytes_are_known_before_they_are_taken(bits):
    keys, values = states(130, batch=2), states(130, batch=2)
    layer = KVQuantLayer(quantiser(), bits)
    cache = KVQuantCache([layer])
    layer.update(keys, values)
    predicted = layer.coded_nbytes(bits, layer.outliers())
    cache.compress()
    assert cache.nbytes() == predicted
