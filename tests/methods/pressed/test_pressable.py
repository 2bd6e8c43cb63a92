"""Presses serve the models that kvpress sees as they are, and no others."""

from __future__ import annotations

import pytest

import kvgauge
from kvgauge.errors import UserError
from kvgauge.methods.pressed.pressable import check_pressable


@pytest.mark.parametrize("name", ["llama", "llama-yarn", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "seed_oss"])
def test_models_as_kvpress_has_them(name, attached):
    check_pressable("kvpress/snapkv", attached(name))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("olmo2", "it makes other queries than layer 0 does"),  # norms over all heads
        ("qwen3_moe", "it makes other queries than layer 0 does"),  # the norm of Qwen3 in another class
        ("granite", "scores are multiplied with 0.2, and it takes 1/√16"),
        ("gpt_oss", "a window, sink logits"),
        ("gemma2", "a soft cap on scores, a window"),
        ("cohere", "turns its keys otherwise"),
        ("deepseek_v3", "caches latents"),
    ],
)
def test_others_are_refused_in_one_line(name, words, attached):
    for _ in range(2):  # what was found is remembered
        with pytest.raises(UserError, match=words) as refusal:
            kvgauge.build_method("kvpress/knorm", budget=0.5).new_cache(attached(name))
        assert "\n" not in str(refusal.value)
