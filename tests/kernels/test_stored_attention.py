"""The compiled attention to stored rows against the dense formula in float64: forms × groups × lengths × masks."""

from __future__ import annotations

import pytest
import torch

from kvgauge.architecture.scaling import Scaling
from kvgauge.kernels.cpu import operators
from kvgauge.kernels.cpu.stored_attention import StoredRun, stored_attention
from kvgauge.kernels.cpu.stored_rows import plain_rows
from kvgauge.store.buffers import GrowingBuffer
from kvgauge.store.half_rows import HalfRows
from kvgauge.store.quantized_rows import ChannelQuantizedRows, TokenQuantizedRows
from kvgauge.store.rotated_rows import RotatedRows
from kvgauge.store.turbo_rows import TurboRows
from kvgauge.store.windowed_rows import WindowedRows

FORMS = {
    "float32": lambda bits: GrowingBuffer(),
    "half": lambda bits: HalfRows(),
    "token": lambda bits: TokenQuantizedRows(bits, 16),
    "balanced": lambda bits: TokenQuantizedRows(bits, 64, balance=True),
    "channel": lambda bits: ChannelQuantizedRows(bits, 64),
    "channel of 32": lambda bits: ChannelQuantizedRows(bits, 32),
    "window, token": lambda bits: WindowedRows(TokenQuantizedRows(bits, 32), 32, 32),
    "window, channel": lambda bits: WindowedRows(ChannelQuantizedRows(bits, 32), 64, 32),
    "rotated": lambda bits: RotatedRows(TokenQuantizedRows(bits, 64), "hadamard"),
    "rotated window": lambda bits: RotatedRows(WindowedRows(TokenQuantizedRows(bits, 64), 32, 32), "orthogonal"),
    "turbo": lambda bits: TurboRows({8: 3.5}.get(bits, bits), signs=False),
    "turbo with signs": lambda bits: TurboRows({8: 2.5}.get(bits, bits), signs=True),
}
CODED = [name for name in FORMS if name not in ("float32", "half")]
HEADS = 3


def buffer(form, bits, tokens, dimension, seed, *, heads=HEADS, later=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(dimension, generator=generator) * 3 + 0.1
    shape = (2, heads) if heads else (2,)
    made = FORMS[form](bits)
    made.set(torch.randn(*shape, tokens, dimension, generator=generator) * scale)
    for _ in range(later):
        made.append(torch.randn(*shape, 1, dimension, generator=generator) * scale)
    return made


def dense(query, keys, values, scaling, hidden=None, counts=None, softcap=None):
    scores = query.double() @ keys.double().mT * scaling
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    if counts is not None:
        scores = scores + counts.double().log()[:, None, None]
    return scores.softmax(dim=-1) @ values.double(), scores.logsumexp(dim=-1)


def check(actual, expected, close=2e-5):
    assert actual is not None, "the kernel declined"
    for mine, exact in zip(actual, expected, strict=True):
        assert float((mine.double() - exact).norm() / exact.norm()) < close


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", CODED)
@pytest.mark.parametrize(("tokens", "later"), [(1, 0), (33, 5), (700, 70), (2100, 1)])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 9])
def test_codes_of_every_form_and_length(form, bits, tokens, later, group):
    keys = buffer(form, bits, tokens, 20 + group, 1, later=later)
    values = buffer(form, bits, tokens, 37 - group, 2, later=later)
    query = torch.randn(2, HEADS, group, 20 + group, generator=torch.Generator().manual_seed(3))
    run = StoredRun(keys.compiled(), values.compiled())
    expected = dense(query, keys.dense(), values.dense(), 0.2)
    check(stored_attention(query, [run], run.output_dim, 0.2), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", ["hidden", "counts", "softcap"])
def test_masks_counts_and_caps(form, masked, dtype):
    tokens, group = 1100, 3
    keys, values = buffer(form, 4, tokens, 24, 1), buffer(form, 4, tokens, 24, 2)
    query = torch.randn(2, HEADS, group, 24, generator=torch.Generator().manual_seed(3)).to(dtype)
    counts = torch.randint(0, 4, (2, tokens), dtype=torch.int32, generator=torch.Generator().manual_seed(4))
    counts[:, -1], counts[0, :400] = 1, 0
    run = StoredRun(keys.compiled(), values.compiled())
    mask = {"hidden": counts > 0, "counts": counts, "softcap": None}[masked]
    scaling = Scaling(0.2, softcap=1.5) if masked == "softcap" else 0.2
    actual = stored_attention(query, [run], 24, scaling, mask)
    expected = dense(
        query,
        keys.dense(),
        values.dense(),
        0.2,
        hidden=counts == 0 if masked == "hidden" else None,
        counts=counts if masked == "counts" else None,
        softcap=1.5 if masked == "softcap" else None,
    )
    check(actual, expected, 2e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_runs_join_and_are_projected(form):
    """Exact sinks in the space of the heads, latents of another rank and an exact tail, some of them hidden."""
    tokens, group, rank_k, rank_v, head_dim = 530, 3, 11, 13, 16
    generator = torch.Generator().manual_seed(5)
    asking = torch.randn(HEADS, head_dim, rank_k, generator=generator)
    expansion = torch.randn(HEADS, head_dim, rank_v, generator=generator)
    sinks = [buffer("half", 8, 4, head_dim, seed) for seed in (6, 7)]
    latents = buffer(form, 8, tokens, rank_k, 8), buffer(form, 8, tokens, rank_v, 9)
    tail = [buffer("float32", 8, 21, head_dim, seed) for seed in (10, 11)]
    query = torch.randn(2, HEADS, group, head_dim, generator=generator)
    mask = torch.rand(2, tokens + 25, generator=generator) > 0.3
    mask[1, :200] = False
    mask[:, -1] = True
    runs = [
        StoredRun(sinks[0].compiled(), sinks[1].compiled()),
        StoredRun(latents[0].compiled(), latents[1].compiled(), plain_rows(asking[None]), plain_rows(expansion[None])),
        StoredRun(tail[0].compiled(), tail[1].compiled()),
    ]
    keys = torch.cat([sinks[0].dense(), latents[0].dense() @ asking.mT, tail[0].dense()], dim=2)
    values = torch.cat([sinks[1].dense(), latents[1].dense() @ expansion.mT, tail[1].dense()], dim=2)
    expected = dense(query, keys, values, 0.1, hidden=~mask)
    check(stored_attention(query, runs, head_dim, 0.1, mask), expected)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", ["float32", "half", "token", "balanced", "rotated", "turbo", "turbo with signs"])
def test_all_queries_ask_one_basis(form, bits, group):
    """One token basis for all heads, and a factor for each in codes."""
    tokens, rank_k, rank_v, head_dim = 1300, 34, 51, 16
    bases = buffer(form, bits, tokens, rank_k, 1, heads=0), buffer(form, bits, tokens, rank_v, 2, heads=0)
    factors = [buffer("token", 8, HEADS * head_dim, rank, rank, heads=0) for rank in (rank_k, rank_v)]
    query = torch.randn(2, HEADS, group, head_dim, generator=torch.Generator().manual_seed(3))
    run = StoredRun(
        bases[0].compiled(),
        bases[1].compiled(),
        factors[0].compiled(head_dim)[0],
        factors[1].compiled(head_dim)[0],
        shared=True,
    )
    assert run.output_dim == head_dim
    keys, values = (
        base.dense()[:, None] @ factor.dense().unflatten(1, (HEADS, head_dim)).mT
        for base, factor in zip(bases, factors, strict=True)
    )
    check(stored_attention(query, [run], head_dim, 0.05), dense(query, keys, values, 0.05))


def test_the_number_of_threads_changes_no_bit():
    keys, values = buffer("channel", 8, 3000, 16, 1), buffer("token", 8, 3000, 16, 2)
    query = torch.randn(2, HEADS, 3, 16, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(stored_attention(query, [StoredRun(keys.compiled(), values.compiled())], 16, 0.25))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_scores_far_apart_neither_overflow_nor_vanish():
    keys, values = buffer("channel", 8, 1500, 4, 1), buffer("token", 8, 1500, 4, 2)
    query = torch.randn(2, HEADS, 2, 4, generator=torch.Generator().manual_seed(0)) * 300
    run = StoredRun(keys.compiled(), values.compiled())
    check(stored_attention(query, [run], 4, 1.0), dense(query, keys.dense(), values.dense(), 1.0), 1e-4)


@pytest.mark.parametrize("case", ["double", "gradient", "group of tokens", "double rows"])
def test_what_it_is_not_compiled_for_is_left_to_torch(case):
    dtype = torch.float64 if case == "double" else torch.float32
    if case == "group of tokens":
        made = ChannelQuantizedRows(4, 24)
        made.set(torch.randn(2, HEADS, 60, 8))
        assert made.compiled() is None
        return
    if case == "double rows":
        assert plain_rows(torch.randn(1, 1, 4, 8, dtype=torch.float64)) is None
        return
    rows = buffer("half", 8, 20, 8, 1).compiled()
    query = torch.randn(2, HEADS, 2, 8, dtype=dtype, requires_grad=case == "gradient")
    assert stored_attention(query, [StoredRun(rows, rows)], 8, 0.3) is None


def test_without_a_compiler_it_does_not_apply(monkeypatch):
    monkeypatch.setattr(operators, "available", lambda: False)
    rows = buffer("half", 8, 20, 8, 1).compiled()
    assert stored_attention(torch.randn(2, HEADS, 2, 8), [StoredRun(rows, rows)], 8, 0.3) is None
