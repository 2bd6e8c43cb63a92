"""Multi-head latent attention: transformers' own logits from latents that are never expanded, and xKV on top."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention

import kvgauge
from kvgauge import configuration
from kvgauge.architecture.facts import attention_modules, model_facts
from kvgauge.errors import UserError
from kvgauge.layers.mla import UpProjections

TINY = configuration.read("model", "tiny/deepseek_v2")["architecture"]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}
VARIANTS = {
    "lite": {},
    "query ranks": {"q_lora_rank": 48},
    "yarn": {"rope_parameters": YARN},
    "v3": {
        "model_type": "deepseek_v3",
        "topk_method": None,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 48,
        "rope_interleave": True,
    },
}


def variant(name):
    architecture = {key: value for key, value in (TINY | VARIANTS[name]).items() if value is not None}
    return kvgauge.load_model("tiny/deepseek_v2", architecture={"q_lora_rank": None} | architecture)[0]


def of_transformers(model):
    """The same weights in transformers' own modules and attention, untouched by this package."""
    own = copy.deepcopy(model)
    for module in attention_modules(own):
        module.__class__ = type(module).__bases__[-1]
    own.set_attn_implementation("eager")
    return own


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(name, tokens):
    model, ids = variant(name), tokens(2, 150)
    own = of_transformers(model)
    method = kvgauge.build_method("full")
    cache = method.new_cache(model)
    with torch.no_grad():
        expected = own(ids).logits
        parts = [model(ids[:, :90], past_key_values=cache).logits, model(ids[:, 90:110], past_key_values=cache).logits]
        cache.compress()
        parts.append(model(ids[:, 110:140], past_key_values=cache).logits)
        parts += [model(step, past_key_values=cache).logits for step in ids[:, 140:].split(1, dim=1)]
        assert relative(torch.cat(parts, dim=1), expected) < 1e-4
        assert relative(model(ids, past_key_values=DynamicCache()).logits, expected) < 1e-4


def test_the_modules_of_transformers_are_the_reference(tokens):
    own = of_transformers(variant("lite"))
    assert all(type(module) is DeepseekV2Attention for module in attention_modules(own))


def test_padded_batches(tokens, tiny):
    model, long, short = tiny("tiny/deepseek_v2"), tokens(1, 80, seed=1), tokens(1, 60, seed=2)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 20, dtype=torch.long), short], dim=1)])
    mask = torch.ones(2, 81, dtype=torch.long)
    mask[1, :20] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    step = tokens(1, 1, seed=3)
    for method in (kvgauge.build_method("full"), kvgauge.build_method("xkv", budget=0.6)):
        cache = method.new_cache(model)
        with torch.no_grad():
            model(batch, attention_mask=mask[:, :80], position_ids=positions[:, :80], past_key_values=cache)
            cache.compress()
            extra = {"attention_mask": mask, "position_ids": positions[:, 80:]}
            together = model(step.expand(2, -1), past_key_values=cache, **extra).logits
            for row, context in enumerate((long, short)):
                alone = method.new_cache(model)
                model(context, past_key_values=alone)
                alone.compress()
                assert relative(together[row], model(step, past_key_values=alone).logits[0]) < 1e-4


def test_a_few_queries_attend_to_latents_and_many_expand_them(tiny):
    projections = UpProjections(attention_modules(tiny("tiny/deepseek_v2"))[0])
    assert not projections.cheaper_expanded(1, 4096, 8)
    assert projections.cheaper_expanded(4096, 4096, 8)


def test_bytes_are_those_of_latents(tiny, tokens):
    model = tiny("tiny/deepseek_v2")
    facts = model_facts(model)
    cache = kvgauge.build_method("full").new_cache(model)
    with torch.no_grad():
        model(tokens(1, 64), past_key_values=cache)
    cache.compress()
    assert cache.nbytes() == facts.full_nbytes(64) == kvgauge.full_nbytes(model, 64) == 64 * 4 * (32 + 8) * 4
    assert facts.expanded_nbytes(64) == 64 * 4 * 8 * (16 + 8 + 16) * 4
    assert facts.expanded_nbytes(64) == 8 * facts.full_nbytes(64)


@pytest.mark.parametrize("group_size", [1, 3, 4])
def test_xkv_truncates_the_svd_of_the_latents(group_size, tiny, tokens):
    model, ids = tiny("tiny/deepseek_v2"), tokens(1, 160)
    method = kvgauge.build_method("xkv", rank=10, group_size=group_size)
    caches = []
    for chosen in (kvgauge.build_method("full"), method):
        caches.append(chosen.new_cache(model))
        with torch.no_grad():
            model(ids, past_key_values=caches[-1])
        caches[-1].compress()
    exact, stored = caches
    for group in method.groups(4):
        rows = [torch.cat([cache.dense(layer)[0][0, 0] for layer in group], dim=-1).double() for cache in caches]
        tail = torch.linalg.svdvals(rows[0])[10:].square().sum().sqrt()
        assert float((rows[1] - rows[0]).norm()) == pytest.approx(float(tail), rel=1e-5)
        for layer in group:
            assert torch.equal(exact.dense(layer)[1], stored.dense(layer)[1])  # the rotary keys


@pytest.mark.parametrize("budget", [0.7, 0.4])
def test_budgets_are_shares_of_the_latent_cache(budget, tiny, tokens):
    model = tiny("tiny/deepseek_v2")
    cache = kvgauge.build_method("xkv", budget=budget, fold_every=8).new_cache(model)
    with torch.no_grad():
        model(tokens(1, 500), past_key_values=cache)
        cache.compress()
        assert budget - 0.01 < cache.nbytes() / kvgauge.full_nbytes(model, 500) <= budget
        for step in tokens(1, 10, seed=1).split(1, dim=1):
            model(step, past_key_values=cache)
    assert (len(cache.layers[0].group.latents), len(cache.layers[0].tail)) == (508, 2)
    cache.crop(-100)
    assert cache.dense(3)[0].shape == (1, 1, 410, 32)
    assert cache.dense(3)[1].shape == (1, 1, 410, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_k": 8, "rank_v": 8}, "one latent"),
        ({"rank": 129}, "above the 128 features"),
        ({"sr": {"chunk": 8, "budget": 16}}, "leave it out"),
        ({"budget": 0.2}, "does not pay"),
    ],
)
def test_bad_input_is_one_line(options, message, tiny):
    with pytest.raises(UserError, match=message):
        kvgauge.build_method("xkv", **options).new_cache(tiny("tiny/deepseek_v2"))


def test_caches_of_keys_per_head_are_refused(tiny, tokens):
    from kvgauge.layers.cache import KVCache
    from kvgauge.layers.exact import ExactLayer

    with pytest.raises(UserError, match="MLA"):
        tiny("tiny/deepseek_v2")(tokens(1, 4), past_key_values=KVCache([ExactLayer() for _ in range(4)]))
