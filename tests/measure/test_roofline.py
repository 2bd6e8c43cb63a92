"""The bound of a decode step: figures made independently of this code, and bytes read against a real cache's."""

from __future__ import annotations

import pytest
import torch

import kvgauge
from kvgauge.measure.accelerators import ACCELERATORS, accelerator
from kvgauge.measure.estimate import LLAMA_3_1_8B
from kvgauge.measure.roofline import CELLS, GROUP, bounds, cross_layer
from kvgauge.measure.shape import Shape

# (stored, read, TPOT) over the uncompressed cache; Llama-3.1-8B, H100, batch 8 of 65,536 tokens.
KNOWN = {
    "kqsvd@0.5": (0.5, 0.5, 0.59),
    "kqsvd@0.25": (0.25, 0.25, 0.384),
    "xkv4@0.25, pre-RoPE": (0.25, 0.956, 1.30),
    "xkv4@0.25, post-RoPE": (0.25, 0.956, 0.964),
    "xkv4+int8@0.125, post-RoPE": (0.125, 0.478, 0.571),
    "kvquant 3 bits": (0.2095, 0.2095, 0.351),
    "kvquant 3 bits, 6 operations a number": (0.2095, 0.2095, 0.748),
}


@pytest.fixture(scope="module")
def llama() -> Shape:
    return Shape.of(LLAMA_3_1_8B)


def test_the_table_of_a_large_model(llama: Shape) -> None:
    rows = {row.cell: row for row in bounds(llama, 65536, 8, accelerator("h100"))}
    assert set(rows) == set(CELLS)
    assert rows["full"].tpot_s == pytest.approx(0.025, rel=0.02)
    for cell, (stored, read, tpot) in KNOWN.items():
        row = rows[cell]
        assert (row.stored, row.read, row.tpot) == pytest.approx((stored, read, tpot), rel=0.02), cell
    assert rows["xkv4@0.25, SR 2048"].tpot == pytest.approx(0.4, rel=0.05)  # landmarks are paid from the budget
    assert [cell for cell, row in rows.items() if not row.can_win] == ["full", "xkv4@0.25, pre-RoPE"]
    assert (rows["xkv4@0.25, pre-RoPE"].limited_by, rows["kqsvd@0.5"].limited_by) == ("products", "bandwidth")


def test_products_below_the_peak_make_a_rebuild_slower_still(llama: Shape) -> None:
    [row] = bounds(llama, 65536, 8, accelerator("h100"), 0.6, ["xkv4@0.25, pre-RoPE"])
    assert row.tpot == pytest.approx(2.05, rel=0.02)


def test_every_layer_of_a_group_reads_the_whole_basis(llama: Shape) -> None:
    work = cross_layer(llama, 65536, 0.25)
    assert GROUP * 0.9 < work.read / work.stored < GROUP


@pytest.mark.parametrize(
    ("name", "fields", "factor"),
    [
        ("full", {}, 1.0),
        ("xkv", {"group_size": 2, "budget": 0.5}, 2.0),
        ("single_svd", {"budget": 0.5}, 1.0),
        ("minicache", {"budget": 0.9}, 2.0),
    ],
)
def test_bytes_read_from_real_caches(name, fields, factor, tiny, tokens) -> None:
    cache = kvgauge.build_method(name, **fields).new_cache(model := tiny("tiny/llama"))
    model(tokens(1, 300), past_key_values=cache)
    cache.compress()
    parts = cache.nbytes_by_part()
    shared = sum(parts.get(part, 0) for part in ("basis", "directions", "columns"))
    assert cache.read_nbytes() == cache.nbytes() + (factor - 1.0) * shared


def test_selective_reconstruction_reads_its_rows_alone(tiny, tokens) -> None:
    model = tiny("tiny/llama")
    caches = []
    for more in ({}, {"sr": {"chunk": 8, "budget": 64}}):
        method = kvgauge.build_method("xkv", group_size=2, budget=0.5, **more)
        caches.append(method.new_cache(model))
        model(tokens(1, 600), past_key_values=caches[-1])
        caches[-1].compress()
    whole, some = (cache.read_nbytes() for cache in caches)
    assert some < 0.75 * whole
    heads = model.config.num_key_value_heads
    parts = caches[1].nbytes_by_part()
    share = 64 * heads / 600
    assert some == pytest.approx(caches[1].nbytes() + (2 * share - 1) * parts["basis"], rel=1e-3)


def test_bad_input_is_one_line(llama: Shape) -> None:
    with pytest.raises(kvgauge.UserError, match="did you mean 'h100'"):
        accelerator("h10")
    for tokens, batch, efficiency in ((0, 1, 1.0), (1, 0, 1.0), (1, 1, 0.0)):
        with pytest.raises(kvgauge.UserError, match="1 or more"):
            bounds(llama, tokens, batch, ACCELERATORS["h100"], efficiency)
    latents = Shape.of(kvgauge.load_model("tiny/deepseek_v2")[0].config, dtype=torch.float32)
    with pytest.raises(kvgauge.UserError, match="cache keys and values alike"):
        bounds(latents, 1024, 1, ACCELERATORS["h100"])
