"""A model is measured only if the uncompressed cache is the model itself: the gate sees what it is not."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import kvgauge
from kvgauge.architecture.facts import model_facts
from kvgauge.architecture.scaling import Scaling
from kvgauge.attend import attention
from kvgauge.errors import UserError
from kvgauge.models import gate
from kvgauge.models.attaching import attach
from kvgauge.models.cut_down import cut_down
from kvgauge.models.gate import GateReport, check_model, require
from kvgauge.models.zoo import ARCHITECTURES, BASE, zoo_model

REFUSED = {
    "doge": "uses cached keys outside of its attention function",
    "diffllama": "uses cached keys outside of its attention function",
    "jetmoe": "uses cached keys outside of its attention function",
    "gptj": "attention code of its own that cannot be replaced",
    "bloom": "attention code of its own that cannot be replaced",
    "mpt": "attention code of its own that cannot be replaced",
    "jamba": "reads a prompt in several passes",
    "bamba": "reads a prompt in several passes",
    "recurrent_gemma": "keeps states elsewhere than in its cache",
    "deepseek_v32": r"an indexer chooses \(sparse attention\)",
}


@pytest.fixture(autouse=True)
def remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("KVGAUGE_CACHE", str(tmp_path))
    return tmp_path / "gate"


@pytest.fixture(scope="module", autouse=True)
def kernels(tiny):
    """Compiled before the cache of this machine is hidden."""
    model = tiny("tiny/llama")
    model(torch.arange(3, 9)[None], past_key_values=kvgauge.build_method("full").new_cache(model))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_right_passes_and_what_is_not_is_refused_by_its_feature(name, attached):
    report = check_model(attached(name))
    assert (report.refused is not None) == (name in REFUSED), report.refused
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]):
            require(attached(name))
        assert "\n" not in str(report.refused)
    else:
        assert require(attached(name)).difference < 1e-5
        assert [layer.index for layer in report.layers if layer.compressible] == [
            *model_facts(attached(name)).compressed
        ]
        assert all(layer.error <= 3e-6 for layer in report.layers)
    assert (report.turning is not None) == (name in REFUSED or name in ("gpt2", "gpt_bigcode", "opt"))


def test_what_is_found_is_in_words(attached):
    layers = check_model(attached("gpt_oss")).layers
    assert [layer.features for layer in layers] == [("a window", "sink logits"), ("sink logits",)] * 2
    layers = check_model(attached("smollm3")).layers
    assert [layer.rotation for layer in layers] == ["halves, default at inv_freq"] * 3 + ["no rotation"]
    assert check_model(attached("glm4")).layers[0].rotation == "8 of 16 dimensions, neighbours, default at inv_freq"
    assert check_model(attached("gpt2")).turning == check_model(attached("gpt2")).layers[0].reason
    assert not check_model(attached("bamba")).passes  # transformers' own logits depend on how a prompt is cut
    assert check_model(attached("llama")).passes


def broken(monkeypatch, name):
    """Leave out what the model needs."""
    if name == "gemma2":
        monkeypatch.setattr(Scaling, "capped", lambda self, scores: scores)
    elif name == "gpt_oss":
        monkeypatch.setattr(Scaling, "share", lambda self, normalisers: None)
    else:
        monkeypatch.setattr(attention, "sdpa_attention_forward", without_mask)


def without_mask(module, query, key, value, attention_mask, **kwargs):
    mask = None if attention_mask is None else torch.ones_like(attention_mask)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


@pytest.mark.parametrize(
    ("name", "feature"), [("gemma2", "a soft cap on scores"), ("gpt_oss", "sink logits"), ("gemma3", "a window")]
)
def test_what_is_left_out_is_seen(name, feature, monkeypatch, attached):
    broken(monkeypatch, name)
    report = check_model(attached(name))
    assert report.difference > 1e-3 and feature in str(report.refused)
    assert "cannot be measured" in str(report.refused)


def test_a_report_is_remembered_for_the_model_and_the_code(remembered, attached, monkeypatch):
    model = attached("llama")
    first = check_model(model)
    (path,) = remembered.iterdir()
    assert GateReport.of(json.loads(path.read_text())) == first
    monkeypatch.setattr(gate, "_checked", lambda *_: pytest.fail("looked again"))
    assert check_model(model) == first
    with pytest.raises(pytest.fail.Exception):
        check_model(model, again=True)
    monkeypatch.setattr(gate.fingerprint, "code_version", lambda *_: "another")
    with pytest.raises(pytest.fail.Exception):
        check_model(model)


def test_nothing_is_lost_where_nothing_can_be_written(remembered, attached):
    remembered.parent.joinpath("gate").write_text("a file where the folder should be")
    assert check_model(attached("llama")).refused is None


def test_the_model_is_left_as_it_was(attached):
    model = attached("gemma3")
    ids = torch.arange(3, 103)[None]
    before = model(ids).logits
    check_model(model, again=True)
    assert model.config.sliding_window == 64 and model.config._attn_implementation == "kvgauge"
    assert len(model.model.layers) == 4
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(("name", "layers"), [("llama", 2), ("gemma3", 2), ("cohere2", 4), ("qwen2-window", 3)])
def test_a_cut_down_model_has_every_kind_of_layer(name, layers, attached):
    model = attached(name)
    small = cut_down(model, 10**9)
    assert small is not None and len(small.model.layers) == len(model_facts(small).layers) == layers
    kinds = {layer.kind for layer in model_facts(model).layers}
    assert {layer.kind for layer in model_facts(small).layers} == kinds
    assert torch.equal(small.model.layers[1].mlp.down_proj.weight, model.model.layers[1].mlp.down_proj.weight)
    assert cut_down(model, 1000) is None


def test_layers_that_share_caches_are_not_cut(attached):
    assert cut_down(attached("gemma3n"), 10**9) is None


def test_half_precision_is_compared_in_float32():
    model = zoo_model("cohere2").to(torch.bfloat16)
    attach(model)
    report = require(model)
    assert report.difference < 1e-5 and report.allowed == 1e-4
    assert all(layer.rotation for layer in report.layers if layer.compressible)


TEXT = BASE | {"pad_token_id": 0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "depth": 1, "num_attention_heads": 2, "num_heads": 2}
VISION |= {"intermediate_size": 32, "image_size": 28, "patch_size": 14, "out_hidden_size": 64}


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl"])
def test_the_text_decoder_inside_a_model_of_several_modalities(kind):
    text = dict(TEXT)
    if kind == "gemma3":
        text |= ARCHITECTURES["gemma3"] | {"rope_parameters": None}
        text.pop("model_type")
        model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=VISION))
    else:
        text["rope_parameters"] |= {"mrope_section": [2, 3, 3]}
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=VISION))
    attach(model.eval())
    report = require(model)
    assert report.difference < 1e-5 and report.turning is None
    assert model_facts(model).compressed == ((1, 3) if kind == "gemma3" else (0, 1, 2, 3))
