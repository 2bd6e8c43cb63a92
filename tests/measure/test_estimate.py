"""The paper estimate: formulas against caches that really hold the bytes, and against hand-counted figures."""

from __future__ import annotations

import pytest
import torch

import kvgauge
from kvgauge.architecture.facts import model_facts
from kvgauge.measure.accelerators import Accelerator
from kvgauge.measure.estimate import FAMILIES, LLAMA_3_1_8B, Cost, cost, estimate, table
from kvgauge.measure.shape import Shape


@pytest.fixture(scope="module")
def llama() -> Shape:
    return Shape.of(LLAMA_3_1_8B)


def test_llama_is_counted_without_its_weights(llama: Shape) -> None:
    assert llama.weight_nbytes == 2 * 8_030_261_248
    assert llama.read_nbytes == llama.weight_nbytes - 2 * 128256 * 4096
    assert llama.facts.full_nbytes(131072) == 2 * 32 * 8 * 128 * 2 * 131072


def shape_of(model) -> Shape:
    return Shape.of(model.config, dtype=torch.float32)


@pytest.mark.parametrize("budget", [0.75, 0.5, 0.3])
def test_per_head_bytes_are_those_of_a_real_cache(budget: float, tiny, fit, tokens) -> None:
    model = tiny("tiny/llama")
    method = kvgauge.build_method("kqsvd", budget=budget)
    cache = method.new_cache(model, fit(method, "tiny/llama"))
    model(tokens(1, 200), past_key_values=cache)
    cache.compress()
    expected = Cost(cache.nbytes(), cache.fixed_nbytes(), model_facts(model).full_nbytes(200))
    assert cost(shape_of(model), "per-head", budget, 200) == expected


@pytest.mark.parametrize("family", FAMILIES[1:])
@pytest.mark.parametrize("budget", [0.5, 0.25, 0.125])
def test_every_family_keeps_its_budget(family: str, budget: float, llama: Shape) -> None:
    size, full = cost(llama, family, budget, 32768).sequence, llama.facts.full_nbytes(32768)
    assert 0.97 * budget * full < size <= budget * full


def test_only_what_compresses_at_the_end_holds_a_whole_exact_context(llama: Shape) -> None:
    full = llama.facts.full_nbytes(131072)
    incoming = {family: cost(llama, family, 0.5, 131072).incoming for family in FAMILIES}
    assert incoming["per-head"] == incoming["cross-layer"] == full
    assert incoming["per-head, compress_prefill"] == 2 * 8 * 128 * 2 * 4096
    assert incoming["merged"] == llama.facts.full_nbytes(512)


def test_the_batch_fits_and_one_more_does_not(llama: Shape) -> None:
    device = Accelerator(nbytes=80 * 10**9, bandwidth=1e12, usable=1.0)
    row, need = estimate(llama, "per-head", 0.25, 131072, device), cost(llama, "per-head", 0.25, 131072)
    activations = 4096 * (8 * 4096 + 3 * 14336) * 2
    rest = llama.weight_nbytes + need.fixed + activations + need.incoming
    assert rest + row.batch * need.sequence <= device.nbytes < rest + (row.batch + 1) * need.sequence
    assert row.step_s == pytest.approx((llama.read_nbytes + need.fixed + row.batch * need.sequence) / 1e12)
    assert row.tokens_per_s == pytest.approx(row.batch / row.step_s)


def test_a_device_that_is_too_small_serves_nothing(llama: Shape) -> None:
    row = estimate(llama, "full", 1.0, 131072, Accelerator(nbytes=20 * 10**9))
    assert (row.batch, row.step_s, row.tokens_per_s) == (0, None, None)


def test_smaller_budgets_serve_more_sequences(llama: Shape) -> None:
    rows = table(llama, 131072, Accelerator())
    for family in FAMILIES[1:]:
        batches = [row.batch for row in rows if row.family == family]
        assert batches == sorted(batches)
        assert batches[-1] > rows[0].batch


def test_bad_input_is_one_line(llama: Shape) -> None:
    with pytest.raises(kvgauge.UserError, match="did you mean 'merged'"):
        cost(llama, "merge", 0.5, 1024)
    for family in ("per-head", "cross-layer", "merged"):
        with pytest.raises(kvgauge.UserError, match="does not pay"):
            cost(llama, family, 1e-9, 1024)
