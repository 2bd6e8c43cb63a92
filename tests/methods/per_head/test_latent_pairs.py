"""One pair for latents that are keys and values at once (MLA): the closed form is optimal, and the cache uses it."""

from __future__ import annotations

import pytest
import torch

import kvgauge
from kvgauge.architecture.facts import attention_modules, latent_output_weight, model_facts
from kvgauge.attend.mask import CAUSAL
from kvgauge.errors import UserError
from kvgauge.layers.mla import UpProjections
from kvgauge.layers.observing import observing_cache

NAME = "tiny/deepseek_v2"


def observed(model, ids):
    seen = []
    with torch.no_grad():
        model.get_decoder()(ids, past_key_values=observing_cache(model, seen.append), use_cache=True)
    return seen


def test_moments_are_of_latents_and_absorbed_queries(tiny, tokens):
    model, ids = tiny(NAME), tokens(2, 50)
    moments = kvgauge.collect(model, [ids])
    seen = observed(model, ids)[2]
    latents, queries = seen.keys[:, 0].flatten(0, 1).double(), seen.queries.flatten(0, 2).double()
    torch.testing.assert_close(moments.keys("post")[2, 0], latents.T @ latents)
    torch.testing.assert_close(moments.values()[2, 0], latents.T @ latents)
    torch.testing.assert_close(moments.queries("post")[2, 0], queries.T @ queries)


def test_absorbed_queries_and_outputs_are_those_of_the_heads(tiny, tokens):
    """``q_nope · (W_UK c) = (q_nope W_UK) · c``, and a head's values through W_O are its latents through W."""
    model = tiny(NAME)
    module = attention_modules(model)[1]
    latents = observed(model, tokens(1, 20))[1].keys
    keys, values = module.expand_kv(latents, torch.zeros(1, 1, 20, 8))
    query = torch.randn(1, 8, 5, 24)
    absorbed = UpProjections(module).absorb(query)[..., :32]
    torch.testing.assert_close(absorbed @ latents.transpose(2, 3), query @ keys.transpose(2, 3), atol=1e-4, rtol=1e-4)
    weight, output = latent_output_weight(model, 1), module.o_proj.weight.T.view(8, 16, 64)
    torch.testing.assert_close(latents[0] @ weight, values[0] @ output, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rank", [6, 20])
def test_kqsvd_is_the_optimum_of_both_products(rank, tiny, tokens):
    model, ids = tiny(NAME), tokens(2, 120)
    method = kvgauge.build_method("kqsvd", rank=rank)
    fitted = method.fit(kvgauge.collect(model, [ids]), model)
    for seen in observed(model, ids):
        latents = seen.keys[:, 0].flatten(0, 1).double()
        queries = seen.queries.flatten(0, 2).double()
        weight = latent_output_weight(model, seen.layer).double()
        outputs = torch.cat(list(weight), dim=1)
        product = torch.cat(
            [
                latents @ queries.T / (latents @ queries.T).norm(),
                latents @ outputs / (latents @ outputs).norm(),
            ],
            dim=1,
        )
        A, B = (fitted.tensors[name][seen.layer, 0, :, :rank] for name in ("A", "B"))
        approximated = latents @ A @ B.T
        both = torch.cat(
            [
                approximated @ queries.T / (latents @ queries.T).norm(),
                approximated @ outputs / (latents @ outputs).norm(),
            ],
            dim=1,
        )
        optimum = torch.linalg.svdvals(product)[rank:].square().sum().sqrt()
        assert float((product - both).norm()) == pytest.approx(float(optimum), rel=1e-4)


@pytest.mark.parametrize("name", ["ksvd", "kqsvd"])
def test_the_cache_attends_to_projected_latents(name, tiny, fit, tokens):
    """The compressed cache gives what an exact cache of the approximated latents gives."""
    model, ids, step = tiny(NAME), tokens(1, 70), tokens(1, 1, seed=3)
    method = kvgauge.build_method(name, rank=20)
    cache = method.new_cache(model, fit(method, NAME))
    exact = kvgauge.build_method("full").new_cache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids, past_key_values=exact)
        cache.compress()
        for layer, approximated in zip(exact.layers, cache.layers, strict=True):
            layer.exact_keys.set(approximated.dense()[0])
        query = torch.randn(1, 8, 1, 24)
        for layer, approximated in zip(exact.layers, cache.layers, strict=True):
            torch.testing.assert_close(
                approximated.attend_compressed(query, CAUSAL, 0.2),
                layer.attend_exact(query, CAUSAL, 0.2),
                atol=1e-4,
                rtol=1e-4,
            )
        model(step, past_key_values=cache)
    assert cache.get_seq_length() == 71
    cache.crop(-11)
    assert cache.dense(0)[0].shape == (1, 1, 60, 32)


@pytest.mark.parametrize("budget", [0.75, 0.4])
def test_budgets_count_the_rotary_keys(budget, tiny, fit, tokens):
    model = tiny(NAME)
    method = kvgauge.build_method("kqsvd", budget=budget)
    cache = method.new_cache(model, fit(method, NAME))
    with torch.no_grad():
        model(tokens(1, 256), past_key_values=cache)
    cache.compress()
    ratio = cache.nbytes() / kvgauge.full_nbytes(model, 256)
    assert budget - 1 / (40 * model_facts(model).num_layers) - 1e-9 <= ratio <= budget
    assert cache.fixed_nbytes() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_k": 4, "rank_v": 8}, "one latent"),
        ({"rank": 33}, "outside 1 … 32"),
        ({"budget": 0.2}, "beside the rotary keys"),
        ({"rank": 4, "window": 8}, "leave out sinks"),
    ],
)
def test_bad_input_is_one_line(options, message, tiny, fit):
    fitted = fit(kvgauge.build_method("kqsvd"), NAME)
    with pytest.raises(UserError, match=message):
        kvgauge.build_method("kqsvd", **options).new_cache(tiny(NAME), fitted)


def test_eigen_has_no_pair_for_latents(tiny, moments):
    with pytest.raises(UserError, match="MLA"):
        kvgauge.build_method("eigen").fit(moments(NAME), tiny(NAME))
