"""Ranks by marginal loss against every way to spend a budget, and the losses against dense formulas."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import kvgauge
from kvgauge.architecture.facts import attention_modules, model_facts, output_weight
from kvgauge.calibration.allocation import interpolated, ladder, lower_hull, spend
from kvgauge.calibration.output_error import held_out_layers
from kvgauge.errors import UserError
from kvgauge.measure.fidelity import observe
from kvgauge.methods.per_head.factorization import Pair, principal_pair, product_pair
from kvgauge.methods.per_head.head_losses import product_losses


def convex_curves(parts, limit, seed):
    steps = torch.rand(parts, limit, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    falls = steps.sort(dim=1, descending=True).values.cumsum(1)
    return torch.cat([falls[:, -1:], falls[:, -1:] - falls], dim=1)


@pytest.mark.parametrize("seed", range(5))
def test_spending_is_the_best_of_all_ways(seed):
    curves = convex_curves(3, 5, seed)
    ranks = spend(list(curves), [2.0] * 3, 19.0)  # nine ranks
    found = sum(float(curve[rank]) for curve, rank in zip(curves, ranks, strict=True))
    ways = [way for way in itertools.product(range(1, 6), repeat=3) if 2 * sum(way) <= 19]
    best = min(sum(float(curve[rank]) for curve, rank in zip(curves, way, strict=True)) for way in ways)
    assert sum(ranks) == 9
    assert found == pytest.approx(best)


def test_dearer_ranks_are_bought_for_more_gain_only():
    curve = torch.linspace(1, 0, 11, dtype=torch.float64)
    cheap, dear = spend([curve, curve], [1.0, 3.0], 20.0)
    assert (cheap, dear) == (10, 3)
    assert spend([curve, curve], [1.0, 3.0], 1000.0) == [10, 10]
    assert spend([curve, 10 * curve], [1.0, 3.0], 34.0) == [4, 10]


def test_hulls_are_below_convex_and_touch():
    curve = torch.tensor([9.0, 8.5, 3.0, 4.0, 2.9, 0.0, 0.0])
    hull = lower_hull(curve)
    assert bool((hull <= curve + 1e-12).all())
    assert bool((hull.diff().diff() >= -1e-12).all())
    assert hull.tolist() == pytest.approx([9, 6, 3, 2, 1, 0, 0])
    rising = lower_hull(torch.tensor([2.0, 1.0, 5.0]))
    assert rising.tolist() == pytest.approx([2, 1, 1])


def test_ladders_end_at_the_full_rank_and_losses_fall_between():
    assert ladder(64) == [1, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64]
    assert ladder(2) == [1, 2]
    assert ladder(1) == [1]
    assert interpolated([1, 3, 5], [8.0, 2.0, 0.0]).tolist() == pytest.approx([8, 8, 4, 2, 1, 0])
    assert interpolated([1, 2], [0.0, 0.0]).tolist() == [0, 0, 0]


@pytest.mark.parametrize("optimal", [True, False])
def test_losses_of_pairs_are_the_dense_ones(optimal):
    generator = torch.Generator().manual_seed(7)
    X, Y = (torch.randn(2, 50, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    C, D = X.mT @ X, Y.mT @ Y
    pair = product_pair(C, D, balanced=True) if optimal else principal_pair(C)
    losses = product_losses(pair, C, D)
    for rank in range(7):
        A, B = pair.A[..., :rank], pair.B[..., :rank]
        expected = (X @ Y.mT - (X @ A) @ (Y @ B).mT).square().sum((1, 2))
        torch.testing.assert_close(losses[:, rank], expected, rtol=1e-9, atol=1e-7)
    if optimal:
        tail = torch.linalg.svdvals(X @ Y.mT)[:, :6].square()
        torch.testing.assert_close(losses[:, 2], tail[:, 2:].sum(1), rtol=1e-9, atol=1e-7)


def test_measured_errors_are_those_of_the_attention_output(tiny, tokens):
    model, ids = tiny("tiny/qwen3"), tokens(1, 48, seed=41)
    (layers,) = held_out_layers(model, ids)
    generator = torch.Generator().manual_seed(8)
    for layer, seen in zip(layers, observe(model, ids), strict=True):
        keys = seen.keys + 0.3 * torch.randn(seen.keys.shape, generator=generator)
        weight = output_weight(model, seen.layer).double()
        assert layer.columns.tolist() == list(range(24, 48))
        outputs = []
        for used in (seen.keys, keys):
            total = torch.zeros(24, weight.shape[-1], dtype=torch.float64)
            for head in range(weight.shape[0]):
                own = head // (weight.shape[0] // used.shape[1])
                for row, column in enumerate(range(24, 48)):
                    past = used[0, own, : column + 1].double()
                    scores = past @ seen.queries[0, head, column].double() / used.shape[-1] ** 0.5
                    total[row] += scores.softmax(0) @ seen.values[0, own, : column + 1].double() @ weight[head]
            outputs.append(total)
        expected = float((outputs[1] - outputs[0]).square().sum()) / layer.scale
        assert layer.loss(keys, seen.values) == pytest.approx(expected, rel=1e-3)
        assert layer.loss(seen.keys, seen.values) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["llama", "granite", "gemma2", "gpt_oss", "cohere", "opt"])
def test_exact_outputs_are_the_models_own(name, attached, tokens):
    """With its factor on the scores, its soft cap and its sink logits."""
    model, ids = attached(name), tokens(1, 60, seed=43)
    outputs = []
    handles = [
        module.register_forward_hook(lambda _m, _i, out: outputs.append(out[0])) for module in attention_modules(model)
    ]
    try:
        (layers,) = held_out_layers(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    for layer, output, module in zip(layers, outputs, attention_modules(model), strict=True):
        last = getattr(module, "o_proj", None) or module.out_proj
        bias = 0 if last.bias is None else last.bias
        torch.testing.assert_close(layer.exact, output[:, layer.columns] - bias, rtol=1e-4, atol=1e-4)


def test_the_scale_is_the_residual_stream_behind_the_attention(tiny, tokens):
    model, ids = tiny("tiny/llama"), tokens(1, 30, seed=42)
    streams = []
    handles = [
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _m, args: streams.append(args[0]))
        for layer in model.model.layers
    ]
    try:
        (layers,) = held_out_layers(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    for layer, stream in zip(layers, streams, strict=True):
        assert layer.scale == pytest.approx(float(stream[0, 15:].double().square().sum()), rel=1e-4)


def test_keys_and_values_of_a_product_compare_by_what_they_do_to_outputs():
    """The first-order argument of the module: relative value errors and squared score errors move outputs alike."""
    generator = torch.Generator().manual_seed(9)
    tokens, dim = 400, 64
    values = torch.randn(tokens, dim, generator=generator, dtype=torch.float64)
    scores = torch.randn(tokens, generator=generator, dtype=torch.float64)
    output = scores.softmax(0) @ values
    moved = {"scores": 0.0, "values": 0.0}
    for _ in range(200):
        wrong = scores + 0.05 * torch.randn(tokens, generator=generator, dtype=torch.float64)
        moved["scores"] += float((wrong.softmax(0) @ values - output).square().sum())
        noise = 0.05 * torch.randn(tokens, dim, generator=generator, dtype=torch.float64)
        moved["values"] += float((scores.softmax(0) @ noise).square().sum())
    assert moved["scores"] == pytest.approx(moved["values"], rel=0.2)


@pytest.mark.parametrize("name", ["ksvd", "eigen", "kqsvd", "xkv"])
@pytest.mark.parametrize("allocate", ["energy", "greedy"])
@pytest.mark.parametrize("budget", [0.75, 0.3])
def test_allocated_bytes_meet_the_budget(name, allocate, budget, tiny, moments, tokens):
    model, ids = tiny("tiny/llama"), tokens(1, 400)
    method = kvgauge.build_method(name, budget=budget, allocate=allocate, sinks=3)
    cache = method.new_cache(model, method.fit(moments("tiny/llama"), model))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cache.compress()
    step = 2 * 400 * 4 / kvgauge.full_nbytes(model, 400)  # the dearest rank there is, of both heads
    assert budget - step <= cache.nbytes() / kvgauge.full_nbytes(model, 400) <= budget


@pytest.mark.parametrize("name", ["kqsvd", "xkv"])
def test_measured_losses_fall_to_nothing_at_full_rank(name, tiny, moments):
    method = kvgauge.build_method(name, allocate="greedy")
    fitted = method.fit(moments("tiny/llama"), tiny("tiny/llama"))
    for loss in ("loss_k", "loss_v"):
        curve = fitted.tensors[loss]
        assert bool((curve[:, -1] == 0).all())
        assert bool((curve[:, 0] > 0).all())


def test_group_energies_are_the_errors_of_their_subspaces(tiny, moments):
    model, known = tiny("tiny/llama"), moments("tiny/llama")
    method = kvgauge.build_method("xkv", allocate="energy", rope="post", group_size=2)
    losses = method.fit(known, model).tensors
    for group in range(2):
        expected = []
        for ids in known.held_out.split(1):
            states = [seen for seen in observe(model, ids) if seen.layer // 2 == group]
            X = torch.cat([seen.values[0].transpose(0, 1).flatten(1) for seen in states], dim=1).double()
            U, S, Vh = torch.linalg.svd(X, full_matrices=False)
            error = ((X - U[:, :9] * S[:9] @ Vh[:9]).chunk(2, dim=1), X.chunk(2, dim=1))
            shares = []
            for seen, wrong, exact in zip(states, *error, strict=True):
                weight = output_weight(model, seen.layer).double()
                sizes = []
                for rows in (wrong, exact):
                    heads = rows.unflatten(1, (seen.values.shape[1], -1)).repeat_interleave(2, dim=1)
                    sizes.append(float(torch.einsum("thd,hdo->tho", heads, weight).square().sum()))
                shares.append(sizes[0] / sizes[1])
            expected.append(sum(shares))
        assert float(losses["loss_v"][group, 9]) == pytest.approx(sum(expected) / len(expected), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "cohere", "hunyuan", "smollm3", "glm4", "gemma3", "gemma2", "granite"])
def test_measured_losses_are_those_of_the_cache_whatever_a_layer_does_to_its_keys(name, attached, tokens):
    """Layers that rotate neighbours, a part of a head or nothing, norms behind it, capped and rescaled scores."""
    model = attached(name)
    known = kvgauge.collect(model, [tokens(2, 100, seed=1)], held_out=tokens(1, 100, seed=11))
    facts = model_facts(model)
    method = kvgauge.build_method("xkv_aware", allocate="greedy", group_size=facts.num_layers, sinks=2)
    fitted = method.fit(known, model)
    features = facts.num_layers * facts.num_key_value_heads * facts.head_dim
    rank = ladder(min(features, 98))[3]
    cut = replace(method, budget=None, rank_k=rank, rank_v=features, allocate="uniform")
    cache = cut.new_cache(model, cut.fit(known, model))
    with torch.no_grad():
        model(known.held_out, past_key_values=cache)
    cache.compress()
    (layers,) = held_out_layers(model, known.held_out)
    expected = sum(layer.loss(cache.dense(index)[0], layer.seen.values) for index, layer in enumerate(layers))
    assert expected > 1e-4
    assert float(fitted.tensors["loss_k"][0, rank]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["ksvd", "xkv"])
def test_bad_input_is_one_line(name, tiny, moments):
    model, known = tiny("tiny/llama"), moments("tiny/llama")
    bare = kvgauge.Moments(known.tensors, known.metadata)
    cases = [
        (lambda: kvgauge.build_method(name, allocate="greed"), "did you mean 'greedy'"),
        (lambda: kvgauge.build_method(name, allocate="energy", rank=4), "rank beside allocate"),
        (lambda: kvgauge.build_method(name, allocate="greedy", rank_k=4, rank_v=4), "rank_k beside allocate"),
        (lambda: kvgauge.build_method(name, allocate="greedy").fit(bare, model), "held-out"),
        (lambda: kvgauge.build_method(name, allocate="greedy").new_cache(model), "needs fitted"),
    ]
    for attempt, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_a_fit_of_another_allocation_is_refused(tiny, fit):
    uniform = fit(kvgauge.build_method("kqsvd"), "tiny/llama")
    kvgauge.build_method("kqsvd", allocate="energy").new_cache(tiny("tiny/llama"), uniform)  # its losses are there
    with pytest.raises(UserError, match="another configuration"):
        kvgauge.build_method("kqsvd", allocate="greedy").new_cache(tiny("tiny/llama"), uniform)


@pytest.mark.parametrize("name", ["kqsvd", "xkv"])
def test_latents_have_nothing_to_allocate(name, tiny, moments):
    method = kvgauge.build_method(name, allocate="energy")
    assert model_facts(tiny("tiny/deepseek_v2")).latent is not None
    with pytest.raises(UserError, match="MLA"):
        method.fit(moments("tiny/deepseek_v2"), tiny("tiny/deepseek_v2"))


def test_pairs_of_nothing_lose_everything():
    empty = Pair(torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64), torch.zeros(4), 0)
    C = torch.eye(3, dtype=torch.float64)
    assert product_losses(empty, C, 2 * C).tolist() == [6.0] * 5
