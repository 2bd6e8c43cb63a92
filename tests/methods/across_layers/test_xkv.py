"""xKV as a cache: its error is the tail of an SVD, its bytes are the formula's, and its limits are told in one line."""

from __future__ import annotations

import pytest
import torch

import kvgauge
from kvgauge.architecture.facts import model_facts
from kvgauge.architecture.planes import from_planes, interleaved, to_planes
from kvgauge.calibration.whitening import output_moments
from kvgauge.contract.fitting import learns
from kvgauge.errors import UserError
from kvgauge.methods.across_layers.ranks import group_ranks, split

WHITE = {"keys": True, "values": True}
WIDTH = 32  # num_key_value_heads · head_dim of the tiny models


def compressed(model, method, ids, fitted=None):
    cache = method.new_cache(model, fitted)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.compress()
    return cache


def exact_rows(model, ids, layers, part):
    """Exact keys (0) or values (1) of some layers, concatenated: (tokens, features)."""
    cache = compressed(model, kvgauge.build_method("full"), ids)
    return torch.cat([cache.dense(layer)[part][0].transpose(0, 1).flatten(1) for layer in layers], dim=-1)


@pytest.mark.parametrize("group_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("rope", "context"), [("pre", 200), ("post", 200), ("pre", 40)])
def test_every_group_is_the_truncated_svd(group_size, rope, context, tiny, tokens):
    model, ids = tiny("tiny/llama"), tokens(1, context)
    method = kvgauge.build_method("xkv", rank_k=12, rank_v=9, group_size=group_size, rope=rope)
    cache = compressed(model, method, ids)
    for group in method.groups(4):
        for part, rank in ((0, 12), (1, 9)):
            exact = exact_rows(model, ids, group, part).double()
            stored = torch.cat([cache.dense(layer)[part][0].transpose(0, 1).flatten(1) for layer in group], dim=-1)
            if part == 0 and rope == "pre":
                rotation = cache.own[0].rotation
                phases = rotation.phases(torch.arange(context)).conj()[:, None]
                turned = from_planes(to_planes(exact.unflatten(-1, (-1, 16)).float()) * phases)
                exact_before = turned.flatten(1).double()
            else:
                exact_before = exact
            tail = torch.linalg.svdvals(exact_before)[rank:].square().sum().sqrt()
            assert float((stored.double() - exact).norm()) == pytest.approx(float(tail), rel=1e-5)


def test_bytes_are_bases_and_factors(tiny, tokens):
    cache = compressed(
        tiny("tiny/llama"), kvgauge.build_method("xkv", rank_k=10, rank_v=14, group_size=2), tokens(1, 100)
    )
    assert cache.nbytes_by_part() == {"basis": 2 * 24 * 100 * 4, "factors": 2 * 24 * 2 * WIDTH * 4}
    assert cache.compress_seconds > 0


@pytest.mark.parametrize("budget", [0.75, 0.5, 0.25])
@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 1},
        {"group_size": 3},
        {"sr": {"chunk": 16, "budget": 64}},
        {"key_share": 0.2},
        {"sinks": 5, "normalize": "layer"},
    ],
)
def test_budgets_are_met_to_one_rank(budget, options, tiny, tokens):
    model, context = tiny("tiny/llama"), 600
    cache = compressed(model, kvgauge.build_method("xkv", budget=budget, **options), tokens(1, context))
    ratio = cache.nbytes() / kvgauge.full_nbytes(model, context)
    one_rank = (context + 4 * WIDTH) * 4 / kvgauge.full_nbytes(model, context)
    assert budget - one_rank <= ratio <= budget


def test_the_budget_counts_layers_that_stay_exact(tiny, tokens):
    model = tiny("tiny/llama")
    method = kvgauge.build_method("xkv", budget=0.5, group_size=2, start_layer=1, end_layer=2)
    with pytest.raises(UserError, match="does not pay"):
        method.new_cache(model)
    cache = compressed(model, kvgauge.build_method("xkv", budget=0.6, group_size=3, start_layer=1), tokens(1, 400))
    assert cache.nbytes() <= 0.6 * kvgauge.full_nbytes(model, 400)
    assert cache.nbytes_by_part()["keys"] == 400 * WIDTH * 4


def test_ranks_follow_the_key_share_and_its_limits():
    assert split(100, 100, 0.4) == (40, 60)
    assert split(150, 80, 0.4) == (70, 80)
    assert split(2, 1, 0.01) == (1, 1)
    ranks = group_ranks(10_000, 100, [64, 64, 32], subspaces=2)
    spent = sum(rank * (100 + size) for rank, size in zip(ranks, [64, 64, 32], strict=True))
    assert 10_000 - 132 < spent <= 10_000


@pytest.mark.parametrize("context", [1, 2, 5])
def test_a_very_short_prompt_is_stored_exactly(context, tiny, tokens):
    model, ids = tiny("tiny/llama"), tokens(1, context + 1)
    cache = compressed(model, kvgauge.build_method("xkv", rank_k=60, rank_v=60), ids[:, :context])
    with torch.no_grad():
        actual = model(ids[:, -1:], past_key_values=cache).logits[0, -1]
        expected = model(ids).logits[0, -1]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=f"budget 0.1 of xkv .* on {context} tokens") as refusal:
        compressed(model, kvgauge.build_method("xkv", budget=0.1), ids[:, :context])
    least = 2 * (context + 4 * WIDTH) * 4 / kvgauge.full_nbytes(model, context)  # rank 1 each
    assert f"{least:.3g}" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "budget", "context"), [("single_svd", 0.002, 1000), ("xkv", 0.02, 20), ("xkv", 0.5, 1), ("xkv", 0.002, 96)]
)
def test_a_budget_out_of_reach_is_one_line(name, budget, context, tiny, tokens):
    with pytest.raises(UserError, match=f"budget {budget:g} of {name} is below") as refusal:
        compressed(tiny("tiny/llama"), kvgauge.build_method(name, budget=budget), tokens(1, context))
    assert "\n" not in str(refusal.value)


def test_folding_projects_the_tail(tiny, tokens):
    model, ids, more = tiny("tiny/llama"), tokens(1, 150), tokens(1, 37, seed=2)
    plain = compressed(model, kvgauge.build_method("xkv", rank=128), ids)
    folded = compressed(model, kvgauge.build_method("xkv", rank=128, fold_every=10), ids)
    with torch.no_grad():
        for step in more.split(1, dim=1):  # rank 128 spans all features: folding loses nothing
            expected = model(step, past_key_values=plain).logits
            actual = model(step, past_key_values=folded).logits
            torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)
    layer = folded.layers[1]
    assert (len(layer.group.keys), len(layer.tail_keys)) == (180, 7)
    assert folded.get_seq_length() == 187
    torch.testing.assert_close(folded.dense(1)[0], plain.dense(1)[0], rtol=1e-3, atol=1e-3)


def test_folded_landmarks_join_the_others(tiny, tokens):
    model = tiny("tiny/llama")
    method = kvgauge.build_method("xkv", rank=20, fold_every=16, sr={"chunk": 8, "budget": 32})
    cache = compressed(model, method, tokens(1, 90))
    with torch.no_grad():
        for step in tokens(1, 20, seed=2).split(1, dim=1):
            assert bool(torch.isfinite(model(step, past_key_values=cache).logits).all())
    assert len(cache.layers[0].landmarks) == 12 + 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rope": "post"},
        {"fold_every": 4},
        {"sinks": 3},
        {"sinks": 3, "sr": {"chunk": 8, "budget": 24}},
        {"whiten": WHITE},
        {"whiten": WHITE, "rope": "post", "sinks": 2},
        {"whiten": WHITE, "sinks": 3, "fold_every": 4, "normalize": "layer"},
    ],
)
def test_padded_batches_give_the_answers_of_one_by_one(options, tiny, fit, tokens):
    model, question = tiny("tiny/qwen3"), tokens(1, 9, seed=6)
    method = kvgauge.build_method("xkv", budget=0.5, **options)
    fitted = fit(method, "tiny/qwen3")
    long, short = tokens(1, 120, seed=4), tokens(1, 90, seed=5)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 30, dtype=torch.long), short], dim=1)])
    mask = torch.ones(2, 129, dtype=torch.long)
    mask[1, :30] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = method.new_cache(model, fitted)
    with torch.no_grad():
        model(batch, attention_mask=mask[:, :120], position_ids=positions[:, :120], past_key_values=cache)
        cache.compress()
        parts = []
        for start, stop in ((120, 124), (124, 128), (128, 129)):
            asked = question.expand(2, -1)[:, start - 120 : stop - 120]
            extra = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
            parts.append(model(asked, past_key_values=cache, **extra).logits)
        for row, context in enumerate((long, short)):
            alone = compressed(model, method, context, fitted)
            expected = [model(part, past_key_values=alone).logits for part in question.split([4, 4, 1], dim=1)]
            expected, actual = torch.cat(expected, dim=1)[0], torch.cat(parts, dim=1)[row]
            assert float((actual - expected).norm() / expected.norm()) < 1e-4


def test_cropping_into_the_context(tiny, tokens):
    model, ids, step = tiny("tiny/llama"), tokens(1, 100), tokens(1, 1, seed=2)
    method = kvgauge.build_method("xkv", rank=100)
    cache = compressed(model, method, ids)
    with torch.no_grad():
        model(tokens(1, 5, seed=3), past_key_values=cache)
        cache.crop(-25)
        actual = model(step, past_key_values=cache).logits[0, -1]
        expected = model(torch.cat([ids[:, :80], step], dim=1)).logits[0, -1]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    chosen = compressed(model, kvgauge.build_method("xkv", rank=100, sr={"chunk": 4, "budget": 8}), ids)
    with pytest.raises(UserError, match="sr"):
        chosen.crop(-25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 0}, "below 1"),
        ({"group_size": 5}, "larger than the 4 layers"),
        ({"start_layer": 4}, "out of range"),
        ({"end_layer": 4}, "out of range"),
        ({"start_layer": 3, "end_layer": 1}, "out of range"),
        ({"rank_k": 129, "rank_v": 3}, "above the 128 features"),
        ({"rank_k": 4}, "one of rank_k and rank_v"),
        ({"rank": 4, "rank_k": 4, "rank_v": 4}, "rank beside"),
        ({"rank": 0}, "below 1"),
        ({"budget": None}, "needs a budget"),
        ({"key_share": 1.0}, "key_share"),
        ({"whiten": {"key": True}}, "did you mean 'keys'"),
        ({"whiten": {"keys": True}}, "needs fitted"),
        ({"normalize": "head"}, "normalize"),
        ({"sinks": -1}, "below 0"),
        ({"rope": "none"}, "rope"),
        ({"svd": "fast"}, "svd"),
        ({"sr": {"chunk": 64, "budget": 32}}, "at least one chunk"),
        ({"sr": {"chunks": 8}}, "did you mean 'chunk'"),
        ({"sr": {"chunk": 8, "budget": 32}, "fold_every": 12}, "not a multiple"),
    ],
)
def test_bad_input_is_one_line(options, message, tiny):
    with pytest.raises(UserError, match=message) as caught:
        kvgauge.build_method("xkv", **options).new_cache(tiny("tiny/llama"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["xkv", "single_svd", "minicache"])
def test_sliding_windows_are_refused(name):
    spec = {
        "model_type": "mistral",
        "sliding_window": 16,
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    model, _ = kvgauge.load_model("tiny/mistral", architecture=spec)
    with pytest.raises(UserError, match=r"nothing to compress .* window of 16 tokens"):
        kvgauge.build_method(name).new_cache(model)


def test_randomized_svd_is_repeatable(tiny, tokens):
    model, ids = tiny("tiny/llama"), tokens(1, 200)
    method = kvgauge.build_method("xkv", rank=12, svd="randomized")
    first, second = compressed(model, method, ids), compressed(model, method, ids)
    assert torch.equal(first.dense(2)[0], second.dense(2)[0])
    other = compressed(model, kvgauge.build_method("xkv", rank=12, svd="randomized", seed=1), ids)
    assert not torch.equal(first.dense(2)[0], other.dense(2)[0])


def test_single_svd_is_xkv_with_groups_of_one(tiny, tokens):
    model, ids = tiny("tiny/llama"), tokens(1, 100)
    single = compressed(model, kvgauge.build_method("single_svd", rank=8), ids)
    grouped = compressed(model, kvgauge.build_method("xkv", rank=8, group_size=1), ids)
    assert torch.equal(single.dense(3)[1], grouped.dense(3)[1])
    assert model_facts(model).num_layers == len(kvgauge.build_method("single_svd").groups(4))


@pytest.mark.parametrize("rope", ["pre", "post"])
def test_whitened_keys_are_the_best_in_the_fitted_metric(rope, tiny, fit, tokens):
    model, ids, group = tiny("tiny/llama"), tokens(1, 200), range(4)
    method = kvgauge.build_method("xkv", rank_k=12, rank_v=9, rope=rope, whiten=WHITE)
    fitted = fit(method, "tiny/llama")
    cache = compressed(model, method, ids, fitted)
    exact = exact_rows(model, ids, group, 0).double()
    stored = torch.cat([cache.dense(layer)[0][0].transpose(0, 1).flatten(1) for layer in group], dim=-1).double()
    metric = score_metrics_of(fitted)
    if rope == "pre":
        rotation = cache.own[0].rotation
        phases = rotation.phases(torch.arange(200)).conj()[:, None]
        exact, stored = (
            interleaved(to_planes(rows.float().unflatten(-1, (-1, 16))) * phases).flatten(1).double()
            for rows in (exact, stored)
        )
    root = torch.linalg.cholesky(metric)
    error = ((stored - exact) @ root).norm()
    best = torch.linalg.svdvals(exact @ root)[12:].square().sum().sqrt()
    assert float(error) == pytest.approx(float(best), rel=1e-4)


def score_metrics_of(fitted):
    """The metric of all layers side by side, a block per layer and head."""
    return torch.block_diag(*(root @ root for root in fitted.tensors["root_k"].double().flatten(0, 1)))


def test_whitened_values_are_the_best_behind_the_output_projection(tiny, tokens):
    model, ids, group = tiny("tiny/llama"), tokens(1, 200), range(4)
    cache = compressed(model, kvgauge.build_method("xkv", rank_k=12, rank_v=9, whiten={"values": True}), ids)
    exact = exact_rows(model, ids, group, 1).double()
    stored = torch.cat([cache.dense(layer)[1][0].transpose(0, 1).flatten(1) for layer in group], dim=-1).double()
    root = torch.linalg.cholesky(torch.block_diag(*output_moments(model).flatten(0, 1)))
    best = torch.linalg.svdvals(exact @ root)[9:].square().sum().sqrt()
    assert float(((stored - exact) @ root).norm()) == pytest.approx(float(best), rel=1e-4)


def test_only_whitened_keys_need_a_fit(tiny, moments, fit):
    for options, learning in (({}, False), ({"whiten": {"values": True}}, False), ({"whiten": {"keys": True}}, True)):
        method = kvgauge.build_method("xkv", **options)
        assert learns(method) is learning
        assert (method.fit(moments("tiny/llama"), tiny("tiny/llama")) is not None) is learning
    pre, post = (kvgauge.build_method("xkv", whiten=WHITE, rope=rope) for rope in ("pre", "post"))
    with pytest.raises(UserError, match="another configuration"):
        post.new_cache(tiny("tiny/llama"), fit(pre, "tiny/llama"))


def test_sinks_stay_exact(tiny, tokens):
    model, ids = tiny("tiny/llama"), tokens(1, 100)
    cache = compressed(model, kvgauge.build_method("xkv", rank=4, sinks=6), ids)
    exact = compressed(model, kvgauge.build_method("full"), ids)
    for part in (0, 1):
        assert torch.equal(cache.dense(2)[part][:, :, :6], exact.dense(2)[part][:, :, :6])
        assert not torch.allclose(cache.dense(2)[part][:, :, 6:], exact.dense(2)[part][:, :, 6:], atol=1e-3)
    assert cache.nbytes_by_part()["sinks"] == 4 * 6 * 2 * WIDTH * 4
    with pytest.raises(UserError, match="exact sinks"):
        cache.crop(-96)


@pytest.mark.parametrize("options", [{"whiten": WHITE}, {"normalize": "layer"}, {"sinks": 2}])
def test_latents_refuse_what_they_have_no_use_for(options, tiny, moments):
    method = kvgauge.build_method("xkv", **options)
    with pytest.raises(UserError, match="MLA"):
        method.new_cache(tiny("tiny/deepseek_v2"), method.fit(moments("tiny/deepseek_v2"), tiny("tiny/deepseek_v2")))
