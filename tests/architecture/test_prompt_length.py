"""Frequencies of one length stay, and what one prompt did to them does not reach the next."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvgauge.architecture.prompt_length import fix_length, fixed_length, install, prompt_length, release_length
from kvgauge.architecture.rotary import Rotary
from kvgauge.errors import UserError
from kvgauge.models.zoo import zoo_model

NAMES = ["llama-dynamic", "phi3-longrope"]  # both change at 128 tokens


def logits(model, tokens, chunk=None):
    ids = torch.randint(3, 259, (1, tokens), generator=torch.Generator().manual_seed(2))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in ids.split(chunk or tokens, dim=1)]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [100, 300])
def test_a_fixed_length_is_that_of_a_whole_prompt(name, tokens):
    model = zoo_model(name)
    whole = logits(model, tokens)
    logits(model, 500)
    with prompt_length(model, tokens):
        torch.testing.assert_close(logits(model, tokens), whole, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits(model, tokens, chunk=64), whole, atol=1e-4, rtol=1e-4)
        states, positions = torch.randn(1, 2, 10, 16), torch.arange(10)[None]
        rotary = Rotary(model)
        torch.testing.assert_close(
            rotary.unrotate(rotary.rotate(states, positions), positions), states, atol=1e-5, rtol=1e-4
        )
    assert fixed_length(model) is None
    torch.testing.assert_close(logits(model, tokens), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_length_that_is_not_fixed_is_refused(name):
    model = zoo_model(name)
    with pytest.raises(UserError, match="changes with the sequence length: fix it for a prompt"):
        Rotary(model)
    fix_length(model, 300)
    long = Rotary(model)
    fix_length(model, 100)
    short = Rotary(model)
    states, places = torch.randn(1, 1, 1, 16), torch.tensor([[90]])
    assert not torch.allclose(long.rotate(states, places), short.rotate(states, places), atol=1e-2)
    release_length(model)
    with pytest.raises(UserError, match="changes with the sequence length"):
        Rotary(model)


def test_prompts_leave_nothing_behind_where_that_is_installed():
    model = zoo_model("llama-dynamic")
    first = logits(model, 200)
    logits(model, 800)
    assert not torch.allclose(logits(model, 200), first, atol=1e-3)  # transformers keeps the longer prompt's
    install(model)
    logits(model, 800)
    torch.testing.assert_close(logits(model, 200), first, atol=1e-5, rtol=1e-5)


def test_other_models_are_left_alone():
    model = zoo_model("llama")
    fix_length(model, 100)
    assert fixed_length(model) is None and not model.model._forward_pre_hooks
    install(model)
    assert not model.model._forward_pre_hooks
