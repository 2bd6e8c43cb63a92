"""The same function in two architectures gives the same compressed answers: what undoing a wrong rotation cannot hide.

ERNIE 4.5 rotates neighbouring dimensions, Llama dimensions half a head apart: with the rows of W_Q and W_K permuted the
one is the other, so each method must lose the same on both.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import kvgauge
from kvgauge.contract.fitting import learns
from kvgauge.models.attaching import attach
from kvgauge.testing import compressed_cache, fit_on_random_tokens, random_tokens, relative_error

CONTEXT = 320
METHODS = [
    ("xkv", {"group_size": 2}),
    ("single_svd", {}),
    ("xkv_aware", {"group_size": 2}),
    ("xkv_aware", {"group_size": 2, "allocate": "energy"}),
    ("xkv_aware", {"group_size": 2, "allocate": "greedy"}),
    ("minicache", {"budget": 0.9}),
    ("kqsvd", {}),
    ("kqsvd", {"allocate": "greedy"}),
    ("eigen", {}),
    ("ksvd", {}),
    ("kvslimmer", {}),
    ("asymkv", {}),
    ("mean_merge", {}),
    ("streaming_llm", {}),
    ("kvquant", {"bits": 3, "budget": None}),
]


@pytest.fixture(scope="module")
def twins(zoo, attached):
    ernie = attached("ernie4_5")
    config = ernie.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    llama = AutoModelForCausalLM.from_config(
        LlamaConfig(**{name: getattr(config, name) for name in names}, rope_parameters=dict(config.rope_parameters)),
        dtype=torch.float32,
    )
    order = torch.cat([torch.arange(0, config.head_dim, 2), torch.arange(1, config.head_dim, 2)])
    weights = {}
    for name, weight in ernie.state_dict().items():
        rotated = name.endswith(("q_proj.weight", "k_proj.weight"))
        weights[name] = weight.unflatten(0, (-1, config.head_dim))[:, order].flatten(0, 1) if rotated else weight
    llama.load_state_dict(weights)
    llama.eval().requires_grad_(False)
    attach(llama)
    return ernie, llama


def test_they_are_the_same_function(twins):
    ids = random_tokens(1, 40)
    first, second = (model(ids).logits for model in twins)
    assert relative_error(first, second) < 1e-5


@pytest.mark.parametrize(("name", "chosen"), METHODS, ids=lambda part: str(part))
def test_compressed_answers_agree(name, chosen, twins):
    options = {"budget": 0.5} | chosen
    ids = random_tokens(1, CONTEXT + 12, seed=4)
    answers, sizes = [], []
    for model in twins:
        method = kvgauge.build_method(name, **{key: value for key, value in options.items() if value is not None})
        fitted = fit_on_random_tokens(method, model) if learns(method) else None
        with torch.no_grad():
            cache = compressed_cache(method, model, fitted, ids[:, :CONTEXT])
            answers.append(model(ids[:, CONTEXT:], past_key_values=cache).logits)
        sizes.append(cache.nbytes())
    with torch.no_grad():
        exact = twins[1](ids).logits[:, CONTEXT:]
    lost = relative_error(answers[1], exact)
    assert lost > 1e-3, "nothing was lost, so nothing is shown"
    assert relative_error(answers[0], answers[1]) < 0.02 * lost
    assert sizes[0] == sizes[1]
