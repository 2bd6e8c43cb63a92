"""K-SVD, Eigen and KQ-SVD as methods: fits, ranks, refusals, and the theorem on a real cache's states."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import kvgauge
from kvgauge.architecture.facts import model_facts, output_weight
from kvgauge.errors import UserError
from kvgauge.measure.fidelity import observe

NAMES = ("ksvd", "eigen", "kqsvd")


def key_errors(fitted, rank, seen):
    """‖K Qᵀ − K A Bᵀ Qᵀ‖² per kv-head of a layer, by the dense formula in float64."""
    A, B = (pair.double() for pair in fitted.truncated(seen.layer, rank, rank)[:2])
    K = seen.keys.double()[0]
    Q = seen.queries.double()[0].unflatten(0, (K.shape[0], -1)).flatten(1, 2)
    return (K @ Q.mT - K @ A @ B.mT @ Q.mT).square().sum((1, 2)), torch.linalg.svdvals(K @ Q.mT)


@pytest.mark.parametrize("model_name", ["tiny/llama", "tiny/qwen3"])
def test_kqsvd_is_optimal_on_the_tokens_it_was_fitted_on(model_name, tiny, tokens):
    model, ids = tiny(model_name), tokens(1, 120, seed=11)
    moments = kvgauge.collect(model, [ids])
    fits = {name: kvgauge.build_method(name, budget=0.5).fit(moments, model) for name in NAMES}
    for seen in observe(model, ids):
        for rank in (2, 6, 11):
            errors = {name: key_errors(fitted, rank, seen)[0] for name, fitted in fits.items()}
            tail = key_errors(fits["kqsvd"], rank, seen)[1][:, rank:].square().sum(1)
            torch.testing.assert_close(errors["kqsvd"], tail, rtol=1e-5, atol=1e-12 * float(tail.max()))
            assert (errors["kqsvd"] <= errors["ksvd"] * (1 + 1e-6)).all()
            assert (errors["kqsvd"] <= errors["eigen"] * (1 + 1e-6)).all()


@pytest.mark.parametrize("weights", ["average", "stack"])
def test_values_are_optimal_for_the_output_projection(weights, tiny, tokens):
    model, ids = tiny("tiny/llama"), tokens(1, 120, seed=12)
    method = kvgauge.build_method("kqsvd", budget=0.5, group_weights=weights)
    fitted = method.fit(kvgauge.collect(model, [ids]), model)
    groups = model_facts(model).num_key_value_groups
    for seen in observe(model, ids):
        heads = output_weight(model, seen.layer).double().unflatten(0, (-1, groups))
        W = heads.mean(1) if weights == "average" else heads.transpose(1, 2).flatten(2)
        _, _, A, B = (pair.double() for pair in fitted.truncated(seen.layer, 5, 5))
        VW = seen.values.double()[0] @ W
        error = (VW - seen.values.double()[0] @ A @ B.mT @ W).square().sum((1, 2))
        tail = torch.linalg.svdvals(VW)[:, 5:].square().sum(1)
        torch.testing.assert_close(error, tail, rtol=1e-5, atol=1e-9 * float(tail.max()))


@pytest.mark.parametrize("name", NAMES)
def test_projections_have_the_ranks_of_the_budget(name, tiny, moments):
    fitted = kvgauge.build_method(name, budget=0.5).fit(moments("tiny/llama"), tiny("tiny/llama"))
    A, B, A_v, B_v = fitted.projections(2)
    assert A.shape == B.shape == A_v.shape == B_v.shape == (2, 16, 8)


def test_separate_ranks_for_keys_and_values(tiny, moments, tokens):
    method = kvgauge.build_method("kqsvd", rank_k=5, rank_v=9)
    model = tiny("tiny/llama")
    fitted = method.fit(moments("tiny/llama"), model)
    assert [tuple(pair.shape) for pair in fitted.projections(0)] == [(2, 16, 5)] * 2 + [(2, 16, 9)] * 2
    cache = method.new_cache(model, fitted)
    with torch.no_grad():
        model(tokens(1, 64), past_key_values=cache)
    cache.compress()
    assert cache.nbytes_by_part() == {"latent_keys": 4 * 2 * 64 * 5 * 4, "latent_values": 4 * 2 * 64 * 9 * 4}


def test_epsilon_gives_every_layer_its_own_ranks(tiny, moments):
    method = kvgauge.build_method("ksvd", epsilon=0.3)
    ranks = method.fit(moments("tiny/llama"), tiny("tiny/llama")).metadata["ranks"]
    looser = kvgauge.build_method("ksvd", epsilon=0.6).fit(moments("tiny/llama"), tiny("tiny/llama")).metadata["ranks"]
    assert all(a[0] >= b[0] and a[1] >= b[1] for a, b in zip(ranks, looser, strict=True))
    assert ranks != looser


def test_exact_tokens_are_paid_from_the_budget(tiny, moments, tokens):
    model = tiny("tiny/llama")
    method = kvgauge.build_method("kqsvd", budget=0.5, sinks=4, window=32)
    fitted = method.fit(moments("tiny/llama"), model)
    cache = method.new_cache(model, fitted)
    with torch.no_grad():
        model(tokens(1, 256), past_key_values=cache)
    cache.compress()
    parts = cache.nbytes_by_part()
    assert parts["sinks"] == kvgauge.full_nbytes(model, 4)
    assert parts["window"] == kvgauge.full_nbytes(model, 32)
    assert 0.48 < cache.nbytes() / kvgauge.full_nbytes(model, 256) <= 0.5


def test_a_window_projects_what_leaves_it(tiny, moments, tokens):
    model = tiny("tiny/llama")
    method = kvgauge.build_method("kqsvd", rank=16, sinks=2, window=8)
    fitted = method.fit(moments("tiny/llama"), model)
    cache = method.new_cache(model, fitted)
    ids = tokens(1, 200, seed=13)
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
        cache.compress()
        outputs = [model(ids[:, [position]], past_key_values=cache).logits for position in range(40, 200)]
        expected = model(ids).logits[:, 40:]
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-3, atol=1e-3)
    assert len(cache.layers[0].recent_keys) < 8 + cache.layers[0].recent_keys.step + 1
    assert len(cache.layers[0].latent_keys) > 40


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"budget": 1.5}, "outside \\(0, 1\\]"),
        ({"budget": 0.0}, "outside \\(0, 1\\]"),
        ({"budget": None}, "needs a budget"),
        ({"budget": None, "rank_k": 4}, "one of rank_k and rank_v"),
        ({"rope": "sideways"}, "`post` or `pre`"),
        ({"sinks": -1}, "0 or more"),
        ({"rankk": 4}, "did you mean 'rank_k'"),
    ],
)
def test_bad_fields_are_one_line(fields, words):
    with pytest.raises(UserError, match=words) as caught:
        kvgauge.build_method("ksvd", **fields)
    assert "\n" not in str(caught.value)


def test_a_rank_above_head_dim(tiny, moments):
    with pytest.raises(UserError, match="outside 1 … 16"):
        kvgauge.build_method("kqsvd", rank=17).fit(moments("tiny/llama"), tiny("tiny/llama"))


def test_projections_of_another_model_or_configuration(tiny, moments):
    method = kvgauge.build_method("kqsvd", budget=0.5)
    fitted = method.fit(moments("tiny/llama"), tiny("tiny/llama"))
    with pytest.raises(UserError, match="another model"):
        method.new_cache(tiny("tiny/mistral"), fitted)
    with pytest.raises(UserError, match="another configuration"):
        dataclasses.replace(method, group_weights="stack").new_cache(tiny("tiny/llama"), fitted)
    with pytest.raises(UserError, match=r"kvgauge fit method=kqsvd"):
        method.new_cache(tiny("tiny/llama"), None)
    with pytest.raises(UserError, match="another model"):
        method.fit(moments("tiny/mistral"), tiny("tiny/llama"))


def test_moments_that_are_not_finite(tiny, moments):
    known = moments("tiny/llama")
    tensors = {name: tensor.clone() for name, tensor in known.tensors.items()}
    tensors["v"][1, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        kvgauge.build_method("ksvd", budget=0.5).fit(kvgauge.Moments(tensors, known.metadata), tiny("tiny/llama"))


def test_a_fit_survives_the_disk(tiny, moments, tmp_path):
    fitted = kvgauge.build_method("kqsvd", budget=0.5).fit(moments("tiny/llama"), tiny("tiny/llama"))
    path = tmp_path / "projections.safetensors"
    fitted.save(path)
    again = kvgauge.Fitted.load(path)
    assert again.metadata["ranks"] == [list(pair) for pair in fitted.metadata["ranks"]]
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in fitted.tensors.items())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        kvgauge.Fitted.load(path)
