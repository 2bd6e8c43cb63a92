"""Presses by name: their files, their parameters, and what is refused before anything is computed."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kvgauge
from kvgauge import configuration
from kvgauge.attend import attention
from kvgauge.contract.identity import config, method_version
from kvgauge.methods.pressed import kvpress, kvpress_conf
from kvgauge.methods.pressed.kvpress_library import library, parameters, presses


def test_the_files_are_those_of_the_installed_package() -> None:
    """Written by `python -m kvgauge.methods.pressed.kvpress_conf`."""
    files = {path.stem: path.read_text(encoding="utf-8") for path in kvpress_conf.FOLDER.glob("*.yaml")}
    assert files == {name: kvpress_conf.text(name) for name in kvpress_conf.names()}


def test_every_press_has_a_file_or_a_reason() -> None:
    exported = {name for name in library().__all__ if name.endswith("Press")} - {"BasePress", "ScorerPress"}
    assert {cls.__name__ for cls in presses().values()} == exported
    refused = set(presses()) - set(kvpress_conf.names())
    for name in refused:
        with pytest.raises(kvgauge.UserError, match="cannot run: it"):
            kvpress.method_class(name)(budget=0.5)
    known = "snapkv expected_attention knorm tova keydiff streaming_llm adakv criticalkv kvzip think pyramidkv lagkv"
    assert set(known.split()) <= set(kvpress_conf.names())


def test_parameters_of_the_press_are_fields_of_the_method() -> None:
    method = kvgauge.build_method("kvpress/snapkv", budget=0.25, window_size=32)
    press = method.new_press()
    assert type(press).__name__ == "SnapKVPress"
    assert (press.window_size, press.kernel_size, press.compression_ratio) == (32, 5, 0.75)
    assert method.label == "kvpress/snapkv@0.25"
    assert kvpress.method_class("snapkv") is kvpress.SnapKVPress
    for name, cls in presses().items():
        if name in kvpress_conf.names():
            assert set(parameters(cls)) <= set(config(kvgauge.build_method(f"kvpress/{name}")))


def test_a_ratio_overrides_the_budget_and_names_the_cell() -> None:
    method = kvgauge.build_method("kvpress/snapkv", budget=0.25, compression_ratio=0.5)
    assert method.new_press().compression_ratio == 0.5
    assert method.label == "kvpress/snapkv@cr0.5"


def test_presses_within_presses() -> None:
    inner = {"name": "snapkv", "window_size": 16}
    press = kvgauge.build_method("kvpress/adakv", press=inner, compression_ratio=0.75).new_press()
    assert (type(press.press).__name__, press.press.window_size, press.press.compression_ratio) == (
        "SnapKVPress",
        16,
        0.75,
    )
    two = [{"name": "snapkv", "compression_ratio": 0.5}, {"name": "think", "key_channel_compression_ratio": 0.25}]
    names = [type(one).__name__ for one in kvgauge.build_method("kvpress/composed", presses=two).new_press().presses]
    assert names == ["SnapKVPress", "ThinKPress"]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("kvpress/snapvk", {}, "did you mean 'kvpress/snapkv'"),
        ("kvpress/snapkv", {"windowsize": 3}, "did you mean 'window_size'"),
        ("kvpress/snapkv", {"window_size": "64"}, "has to be a whole number, e.g. method.window_size=64"),
        ("kvpress/criticalkv", {"epsilon": "small"}, "has to be a number"),
        ("kvpress/cur", {"leverage_type": "keys"}, "did you mean 'key'"),
        ("kvpress/adakv", {"press": {"name": "snapkv", "window_size": 2.5}}, "has to be a whole number"),
        ("kvpress/snapkv", {"compression_ratio": 1.0}, r"outside \[0, 1\)"),
        ("kvpress/snapkv", {"budget": 1.5}, r"outside \(0, 1\]"),
        ("kvpress/kvzip", {"budget": 0.5}, "masks and frees no bytes"),
        ("kvpress/simlayerkv", {"budget": 0.5}, "takes no budget and no ratio"),
        ("kvpress/simlayerkv", {"lazy_threshold": 2.0}, "refuses its parameters"),
        ("kvpress/adakv", {"press": "snap"}, "did you mean 'snapkv'"),
        ("kvpress/adakv", {"press": {"name": "snapkv", "window": 3}}, "did you mean 'window_size'"),
        ("kvpress/adakv", {"press": "simlayerkv"}, "requires a ScorerPress"),
    ],
)
def test_mistakes_are_told_in_one_line(name: str, settings: dict, message: str) -> None:
    with pytest.raises(kvgauge.UserError, match=message):
        kvgauge.build_method(name, **settings)


def test_hydra_composes_a_press_and_its_parameters() -> None:
    with initialize_config_dir(str(configuration.CONF_DIR), version_base=None):
        cfg = compose("config", ["method=kvpress/snapkv", "method.budget=0.25", "method.window_size=16"])
    method = configuration.build(cfg.method, "method")
    assert method == kvgauge.build_method("kvpress/snapkv", budget=0.25, window_size=16)


def test_transformers_attention_functions_are_not_replaced() -> None:
    model = kvgauge.load_model("tiny/llama")[0]
    library()
    assert ALL_ATTENTION_FUNCTIONS[attention.NAME] is attention.attention_forward
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = model(ids).logits
        actual = model(ids, past_key_values=kvgauge.build_method("full").new_cache(model)).logits
    torch.testing.assert_close(actual, expected)
    sources = {getattr(function, "__module__", "") for function in ALL_ATTENTION_FUNCTIONS.values()}
    assert not any(source.startswith("kvpress") for source in sources)


def test_without_the_package_one_line_says_how_to_install_it() -> None:
    code = (
        "import sys; sys.modules['kvpress'] = None\n"  # what Python itself writes there to forbid an import
        "import kvgauge\n"
        "try: kvgauge.build_method('kvpress/snapkv', window_size=8)\n"
        "except kvgauge.UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install --no-deps kvpress==" in done.stdout
    assert done.stderr == ""


def test_a_press_knows_its_version() -> None:
    method = kvgauge.build_method("kvpress/snapkv")
    assert method_version(method).endswith("-kvpress-0.5.5")


@pytest.mark.parametrize("name", ["knorm", "keydiff", "tova"])
def test_while_decoding_it_keeps_what_kvpress_keeps(name: str) -> None:
    """Its own `PrefillDecodingPress` on transformers' cache, one period long: the target is then a number of tokens."""
    model = kvgauge.load_model("tiny/llama")[0]
    ids = torch.randperm(250, generator=torch.Generator().manual_seed(2))[None, :96] + 3  # no token twice: no ties
    method = kvgauge.build_method(f"kvpress/{name}", budget=0.5, while_decoding={"every": 16})
    mine, theirs = method.new_cache(model), DynamicCache()
    cls = presses()[name]
    press = library().PrefillDecodingPress(
        prefilling_press=cls(compression_ratio=0.5),
        decoding_press=library().DecodingPress(base_press=cls(), compression_interval=16, target_size=48),
    )
    with torch.no_grad():
        model(ids[:, :80], past_key_values=mine)
        mine.compress()
        for step in range(80, 96):
            mine_says = model(ids[:, step : step + 1], past_key_values=mine).logits
        plain = copy.deepcopy(model)
        plain.set_attn_implementation("sdpa")
        with press(plain):
            positions = torch.arange(96)[None]
            plain(ids[:, :80], past_key_values=theirs, cache_position=positions[0, :80])
            for step in range(80, 96):
                part = {"position_ids": positions[:, step : step + 1], "cache_position": positions[0, step : step + 1]}
                theirs_say = plain(ids[:, step : step + 1], past_key_values=theirs, **part).logits
    torch.testing.assert_close(mine_says, theirs_say, rtol=1e-4, atol=1e-5)
    for layer, other in zip(mine.own, theirs.layers, strict=True):
        assert layer.physical_length == other.keys.shape[2] == 48
        torch.testing.assert_close(layer.keys_buffer.dense(), other.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.values_buffer.dense(), other.values, rtol=1e-4, atol=1e-5)
