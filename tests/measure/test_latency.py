"""The latency measurement: what is timed is what is said; never how long it took."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import DynamicCache

import kvgauge
from kvgauge import configuration
from kvgauge.architecture.facts import model_facts
from kvgauge.errors import UserError
from kvgauge.measure.latency import (
    LatencyConfig,
    attention_seconds,
    baselines,
    cache_nbytes,
    contender,
    measure_point,
    run_alone,
)
from kvgauge.measure.synthetic import fill

QUICK = {"decode_steps": 3, "warmup": 1, "repeats": 2}


def contenders(model, fit, *methods):
    return baselines(model) + [contender(model, method, fit(method, "tiny/llama")) for method in methods]


@pytest.mark.parametrize("prefill", ["real", "synthetic"])
def test_rows_of_a_point(prefill: str, tiny, fit) -> None:
    model = tiny("tiny/llama")
    method = kvgauge.build_method("kqsvd", budget=0.5)
    rows = measure_point(model, contenders(model, fit, method), LatencyConfig(prefill=prefill, **QUICK), 2, 80)
    assert [row["cell"] for row in rows] == ["dynamic", "full", "full-one-pass", "kqsvd@0.5"]
    full = 2 * model_facts(model).full_nbytes(80)
    dynamic, static, one_pass, ours = rows
    assert dynamic["nbytes"] == full
    assert static["nbytes"] == 2 * model_facts(model).full_nbytes(80 + 4)  # room for the decoded tokens from the start
    assert one_pass["nbytes"] == static["nbytes"]
    assert ours["nbytes"] == full // 2
    assert ours["fixed_nbytes"] > 0
    assert ours["weights_nbytes"] == sum(parameter.nbytes for parameter in model.parameters())
    assert static["tpot_over_static"] == dynamic["tpot_over_dynamic"] == one_pass["tpot_over_one_pass"] == 1.0
    for row in rows:
        assert (row["batch"], row["context_length"]) == (2, 80)
        assert row["tpot_p95_s"] >= row["tpot_median_s"] > 0
        assert row["tokens_per_s"] == pytest.approx(2 / row["tpot_median_s"])
        assert row["mbu"] > 0
        assert (row["ttft_s"] is None) == (row["ttft_over_static"] is None) == (prefill == "synthetic")
    if prefill == "real":
        assert ours["ttft_s"] > ours["compress_s"] > 0
        assert static["ttft_over_static"] == 1.0
    assert dynamic["attention_s"] is None
    assert static["attention_s"] > 0


@pytest.mark.parametrize("name", ["gemma3", "falcon_h1", "lfm2", "mistral-window"])
def test_windows_and_states_count_as_transformers_has_them(name, attached) -> None:
    model = attached(name)
    full = model_facts(model).full_nbytes
    rows = measure_point(model, baselines(model), LatencyConfig(**QUICK), 2, 80)
    assert rows[0]["nbytes"] == 2 * full(80)
    assert 2 * full(80) <= rows[1]["nbytes"] <= 2 * full(84)
    with pytest.raises(UserError, match=r"has windows or states, which no random keys fill: use latency.prefill=real$"):
        measure_point(model, baselines(model), LatencyConfig(prefill="synthetic", **QUICK), 2, 80)


def test_only_a_table_of_positions_ends(attached) -> None:
    config = LatencyConfig(**QUICK)
    assert len(measure_point(attached("llama-dynamic"), baselines(attached("llama-dynamic")), config, 1, 600)) == 3
    with pytest.raises(UserError, match="context with its decode steps of 2054 tokens is longer"):
        measure_point(attached("gpt2"), baselines(attached("gpt2")), config, 1, 2050)


def test_a_real_prefill_goes_chunk_by_chunk(tiny, fit) -> None:
    model, seen = tiny("tiny/llama"), []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs.get("input_ids", args[0] if args else None)).shape[1]),
        with_kwargs=True,
    )
    try:
        config = LatencyConfig(decode_steps=1, warmup=0, repeats=1, prefill_chunk=32)
        measure_point(model, contenders(model, fit), config, 1, 80)
    finally:
        hook.remove()
    assert seen == [16, *([32, 32, 16, 1] * len(baselines(model)))]


def test_every_method_can_be_timed(tiny, fit) -> None:
    model = tiny("tiny/llama")
    methods = [kvgauge.build_method(name) for name in kvgauge.list_methods() if name != "full"]
    rows = measure_point(
        model, contenders(model, fit, *methods), LatencyConfig(decode_steps=1, warmup=0, repeats=1), 1, 96
    )
    assert [row["cell"] for row in rows[len(baselines(model)) :]] == [method.label for method in methods]


def test_a_compressing_prefill_is_timed_for_real_only(tiny, fit) -> None:
    model = tiny("tiny/llama")
    cells = contenders(model, fit, kvgauge.build_method("ksvd", budget=0.5, compress_prefill=True))
    row = measure_point(model, cells, LatencyConfig(**QUICK), 1, 40)[-1]
    assert row["ttft_s"] > 0
    with pytest.raises(kvgauge.UserError, match=r"latency\.prefill=real"):
        measure_point(model, cells, LatencyConfig(prefill="synthetic", **QUICK), 1, 40)


def test_synthetic_states_reach_every_layer(tiny) -> None:
    model, states = tiny("tiny/llama"), torch.randn(2, 2, 30, 16)
    for cache in (DynamicCache(), kvgauge.build_method("full").new_cache(model)):
        fill(model, cache, states, states)
        assert cache.get_seq_length() == 30
        assert cache_nbytes(cache) >= 2 * model_facts(model).full_nbytes(30)
        model(torch.tensor([[5], [6]]), past_key_values=cache)
        assert cache.get_seq_length() == 31


@pytest.mark.parametrize("members", [None, ("kqsvd",), ("int4",)])
@pytest.mark.parametrize("name", ["kvslimmer", "asymkv", "streaming_llm"])
def test_a_merging_cache_is_filled_with_what_it_keeps(name, members, tiny, fit) -> None:
    model, fields = tiny("tiny/llama"), {"start": 4, "window": 16, "budget": 0.25}
    method = kvgauge.build_method(name, **fields)
    if members is not None:
        method = kvgauge.build_method("compose", compose=[{"method": name, **fields}, *members], budget=None)
    rows = measure_point(model, contenders(model, fit, method), LatencyConfig(prefill="synthetic", **QUICK), 2, 200)
    assert rows[-1]["attention_s"] > 0 and rows[-1]["ttft_s"] is None
    assert rows[-1]["nbytes"] <= 2 * 0.25 * model_facts(model).full_nbytes(200)
    cache = method.new_cache(model, fit(method, "tiny/llama"))
    fill(model, cache, *[torch.randn(2, 2, 200, 16)] * 2)
    cache.compress()
    assert cache.get_seq_length() == 200
    with torch.no_grad():
        for _ in range(20):
            model(torch.tensor([[5], [6]]), past_key_values=cache)
    assert cache.get_seq_length() == 220 and cache.physical_length() < 75


@pytest.mark.parametrize("prefill", ["real", "synthetic"])
def test_latents_are_timed_as_keys_and_values_are(prefill: str, tiny) -> None:
    model = tiny("tiny/deepseek_v2")
    cells = [*baselines(model), contender(model, kvgauge.build_method("xkv", budget=0.5), None)]
    rows = measure_point(model, cells, LatencyConfig(prefill=prefill, **QUICK), 2, 80)
    assert [row["cell"] for row in rows] == ["dynamic", "full", "xkv@0.5"]
    assert rows[0]["nbytes"] == 2 * model_facts(model).full_nbytes(80)
    assert rows[-1]["nbytes"] <= 1.02 * rows[0]["nbytes"] / 2
    assert all(row["attention_s"] > 0 for row in rows[1:])


def test_attention_alone_leaves_the_cache_as_it_was(tiny, fit, tokens) -> None:
    model, method = tiny("tiny/llama"), kvgauge.build_method("kqsvd", budget=0.5)
    cache = method.new_cache(model, fit(method, "tiny/llama"))
    model(tokens(1, 40), past_key_values=cache)
    cache.compress()
    before = cache.nbytes(), cache.get_seq_length()
    assert attention_seconds(model, cache, batch=1) > 0
    assert (cache.nbytes(), cache.get_seq_length()) == before


def test_cells_are_methods_with_their_fields() -> None:
    config = LatencyConfig(
        cells=[
            {"method": "ksvd", "budget": 0.25},
            {"method": "ksvd", "name": "streamed", "budget": 0.25, "compress_prefill": True},
            {"method": "full"},
            {"method": "kvgauge.methods.merging.streaming_llm.StreamingLLM", "name": "by-path", "budget": 0.5},
        ]
    )
    methods = config.methods([kvgauge.build_method("kqsvd")] * 2)
    assert [method.label for method in methods] == ["ksvd@0.25", "streamed@0.25", "by-path@0.5"]  # full is a baseline
    assert [method.label for method in LatencyConfig().methods([kvgauge.build_method("kqsvd")] * 2)] == ["kqsvd@0.5"]


def test_points_are_sorted_by_size_and_distinct() -> None:
    config = LatencyConfig(context_lengths=[512, 64], batch_sizes=[4, 1, 4])
    assert config.points == [(1, 64), (4, 64), (1, 512), (4, 512)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prefill": "reel"}, "did you mean 'real'"),
        ({"context_lengths": []}, "latency.context_lengths"),
        ({"batch_sizes": [0]}, "latency.batch_sizes"),
        ({"decode_steps": 0}, "latency.decode_steps is 0"),
        ({"warmup": -1}, "latency.warmup is -1"),
        ({"repeats": 0}, "latency.repeats is 0"),
        ({"prefill_chunk": 0}, "latency.prefill_chunk is 0"),
        ({"cells": [{"budget": 0.5}]}, "names its method"),
    ],
)
def test_a_bad_grid_is_one_line(fields: dict[str, object], message: str) -> None:
    with pytest.raises(kvgauge.UserError) as refusal:
        LatencyConfig(**fields)  # type: ignore[arg-type]
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_cells_of_one_label_and_unknown_methods_are_refused() -> None:
    cells = [{"method": "ksvd", "budget": 0.5, "window": window} for window in (0, 8)]
    with pytest.raises(kvgauge.UserError, match=r"two different cells are called ksvd@0\.5"):
        LatencyConfig(cells=cells).methods([])
    with pytest.raises(kvgauge.UserError, match="did you mean 'kqsvd'"):
        LatencyConfig(cells=[{"method": "kqsdv"}]).methods([])


@pytest.mark.parametrize("cell", ["dynamic", "full", "full-one-pass", "kqsvd"])
def test_a_cell_alone(cell: str, tmp_path, fit) -> None:
    projections = None
    if cell == "kqsvd":
        projections = tmp_path / "projections.safetensors"
        fit(kvgauge.build_method("kqsvd"), "tiny/llama").save(projections)
    job = {
        "model": configuration.read("model", "tiny/llama"),
        "cell": cell,
        "method": configuration.read("method", cell) if cell == "kqsvd" else None,
        "projections": projections and str(projections),
        "latency": dict(QUICK),
        "batch": 1,
        "context_length": 64,
    }
    memory = run_alone(json.loads(json.dumps(job)))
    assert memory["peak_bytes"] >= memory["before_bytes"] > 0


def test_cells_may_have_fields_that_are_mappings() -> None:
    cell = {"method": "xkv", "group_size": 2, "budget": 0.5, "sr": {"chunk": 8, "budget": 64}}
    config = LatencyConfig(cells=[cell, cell | {"name": "again"}])
    assert [method.label for method in config.methods([])] == ["xkv@0.5", "again@0.5"]
