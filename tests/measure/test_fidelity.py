"""The seven errors against the dense formulas in float64."""

from __future__ import annotations

import pytest
import torch

import kvgauge
from kvgauge.architecture.facts import output_weight
from kvgauge.errors import UserError
from kvgauge.measure import fidelity
from kvgauge.methods.per_head.factorization import product_pair
from pipelines.studies.fit_cost import stacked_pair


def dense_errors(seen, guess, weight):
    """Every matrix at full size, no shortcut."""
    groups = seen.queries.shape[1] // seen.keys.shape[1]
    Q, K, V = seen.queries.double(), seen.keys.double(), seen.values.double()
    K_hat, V_hat, Q_hat = guess.keys.double(), guess.values.double(), guess.queries.double()
    W = weight.double()

    def spread(states):
        return states.repeat_interleave(groups, dim=1)

    def relative(a, b):
        return float((a - b).norm() / b.norm())

    scale, tokens = K.shape[-1] ** -0.5, K.shape[2]
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    scores, scores_hat = Q @ spread(K).mT, Q @ spread(K_hat).mT
    P, P_hat = ((s * scale).masked_fill(future, -torch.inf).softmax(-1) for s in (scores, scores_hat))
    return {
        "K": relative(K_hat, K),
        "Q": relative(Q_hat, Q),
        "V": relative(V_hat, V),
        "KQ": relative(scores_hat, scores),
        "VO": relative(spread(V_hat) @ W, spread(V) @ W),
        "softmax": relative(P_hat, P),
        "output": relative((P_hat @ spread(V_hat) @ W).sum(1), (P @ spread(V) @ W).sum(1)),
    }


@pytest.mark.parametrize("name", ["ksvd", "eigen", "kqsvd"])
def test_the_seven_errors(name, tiny, moments, tokens, monkeypatch):
    monkeypatch.setattr(fidelity, "QUERY_BLOCK", 17)
    model, ids = tiny("tiny/llama"), tokens(1, 60, seed=31)
    fitted = kvgauge.build_method(name, budget=0.5).fit(moments("tiny/llama"), model)
    rows = list(fidelity.projection_errors(model, fitted, "post", [(8, 8), (4, 12)], ids))
    for seen in fidelity.observe(model, ids):
        for rank_k, rank_v in ((8, 8), (4, 12)):
            guess = fidelity.projected(fitted, seen.layer, rank_k, rank_v, seen)
            expected = dense_errors(seen, guess, output_weight(model, seen.layer))
            measured = {
                row["quantity"]: row["error"] for row in rows if (row["layer"], row["rank_k"]) == (seen.layer, rank_k)
            }
            assert measured == pytest.approx(expected, rel=1e-4)


def test_a_cache_s_errors_are_those_of_its_pairs(tiny, moments, tokens):
    model, ids = tiny("tiny/llama"), tokens(1, 60, seed=32)
    method = kvgauge.build_method("kqsvd", rank=8)
    fitted = method.fit(moments("tiny/llama"), model)
    cache = fidelity.compress_context(model, method, fitted, ids)
    of_cache = {(row["layer"], row["quantity"]): row["error"] for row in fidelity.cache_errors(model, cache, ids)}
    for row in fidelity.projection_errors(model, fitted, "post", [(8, 8)], ids):
        if row["quantity"] != "Q":
            assert of_cache[row["layer"], row["quantity"]] == pytest.approx(row["error"], rel=1e-3)


def test_pre_rope_pairs_are_rotated_before_they_are_compared(tiny, moments, tokens):
    model, ids = tiny("tiny/llama"), tokens(1, 40, seed=33)
    fitted = kvgauge.build_method("kqsvd", rank=16, rope="pre").fit(moments("tiny/llama"), model)
    for row in fidelity.projection_errors(model, fitted, "pre", [(16, 16)], ids):
        assert row["error"] < 1e-4


def test_kl_and_perplexity_of_an_exact_cache(tiny, tokens):
    model, context, more = tiny("tiny/llama"), tokens(1, 50, seed=34), tokens(1, 20, seed=35)
    method = kvgauge.build_method("full")
    cache = fidelity.compress_context(model, method, None, context)
    found = fidelity.model_fidelity(model, method, cache, context, more)
    assert abs(found.kl) < 1e-6
    with torch.no_grad():
        logits = model(torch.cat([context, more], 1)).logits[0, 50:69]
    expected = torch.nn.functional.cross_entropy(logits.double(), more[0, 1:]).exp()
    assert found.perplexity == pytest.approx(float(expected), rel=1e-4)
    assert found.perplexity_full == pytest.approx(float(expected), rel=1e-4)
    assert found.nbytes == found.full_nbytes == kvgauge.full_nbytes(model, 50)
    with pytest.raises(UserError, match="at least 2 tokens"):
        fidelity.model_fidelity(model, method, cache, context, more[:, :1])


def test_the_published_way_gives_the_same_product():
    X, Y = torch.randn(90, 8, dtype=torch.float64), torch.randn(200, 8, dtype=torch.float64)
    A, B = stacked_pair(X, Y)
    pair = product_pair(X.T @ X, Y.T @ Y, balanced=False)
    torch.testing.assert_close(A[:, :3] @ B[:, :3].T, pair.A[:, :3] @ pair.B[:, :3].T, rtol=1e-7, atol=1e-9)


def test_latents_have_no_errors_of_heads(tiny, tokens):
    model, ids = tiny("tiny/deepseek_v2"), tokens(1, 40)
    method = kvgauge.build_method("xkv", budget=0.8, group_size=2)
    cache = fidelity.compress_context(model, method, None, ids[:, :30])
    with pytest.raises(UserError, match=r"^latents \(MLA\) are no keys and values of heads"):
        list(fidelity.cache_errors(model, cache, ids[:, :30]))
    assert fidelity.model_fidelity(model, method, cache, ids[:, :30], ids[:, 30:]).kl >= 0
