"""Every method of the registry, and what is in it that takes another way on devices."""

from __future__ import annotations

from typing import Any

XKV_POST = {"method": "xkv", "group_size": 3, "rope": "post"}
MERGER = {"method": "kvslimmer", "window": 32, "start": 4}

# Groups of three layers span the border of four layers on two devices.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "full one_pass": ("full", {"one_pass": True}),
    "kqsvd": ("kqsvd", {"budget": 0.5}),
    "kqsvd sinks and window": ("kqsvd", {"budget": 0.5, "sinks": 4, "window": 16}),
    "kqsvd compress_prefill": ("kqsvd", {"budget": 0.5, "compress_prefill": True}),
    "ksvd": ("ksvd", {"budget": 0.5}),
    "eigen": ("eigen", {"budget": 0.5}),
    "xkv": ("xkv", {"budget": 0.5, "group_size": 3}),
    "xkv group of all": ("xkv", {"budget": 0.5, "group_size": 4}),
    "xkv post": ("xkv", {"budget": 0.5, "group_size": 3, "rope": "post", "sinks": 2}),
    "xkv sr": ("xkv", {"budget": 0.5, "group_size": 3, "sr": {"chunk": 16, "budget": 64}}),
    "xkv fold": ("xkv", {"budget": 0.5, "group_size": 3, "fold_every": 2}),
    "xkv randomized": ("xkv", {"rank": 8, "budget": None, "group_size": 3, "svd": "randomized"}),
    "xkv normalized": ("xkv", {"budget": 0.5, "group_size": 3, "normalize": "layer"}),
    "xkv_aware": ("xkv_aware", {"budget": 0.5, "group_size": 3}),
    "single_svd": ("single_svd", {"budget": 0.5}),
    "minicache": ("minicache", {"budget": 0.9, "start_layer": 1}),
    "kvslimmer": ("kvslimmer", {"budget": 0.5, "window": 32, "start": 4}),
    "asymkv": ("asymkv", {"budget": 0.5, "window": 32, "start": 4}),
    "mean_merge": ("mean_merge", {"budget": 0.5, "window": 32, "start": 4}),
    "streaming_llm": ("streaming_llm", {"budget": 0.5, "window": 32, "start": 4}),
    "kvquant": ("kvquant", {"bits": 3}),
    "kvquant post": ("kvquant", {"bits": 4, "pre_rope": False}),
    "quantized_cache": ("quantized_cache", {"bits": 4}),
    "full and int4": ("compose", {"budget": 0.35, "compose": ["full", "int4"]}),
    "kqsvd and int8": ("compose", {"budget": 0.25, "compose": ["kqsvd", "int8"]}),
    "kqsvd and int3": ("compose", {"budget": 0.25, "compose": ["kqsvd", "int3"]}),
    "xkv and int8": ("compose", {"budget": 0.25, "compose": [XKV_POST, "int8"]}),
    "xkv pre and int4": ("compose", {"budget": 0.25, "compose": [{"method": "xkv", "group_size": 3}, "int4"]}),
    "kvslimmer and kqsvd": ("compose", {"budget": 0.25, "compose": [MERGER, "kqsvd"]}),
    "kvslimmer and int4": ("compose", {"budget": 0.25, "compose": [MERGER, "full", "int4"]}),
    "snapkv": ("kvpress/snapkv", {"budget": 0.5}),
    "knorm": ("kvpress/knorm", {"budget": 0.5}),
    "expected_attention": ("kvpress/expected_attention", {"budget": 0.5}),
}

# hqq searches its scales in float16 on every device but the CPU. A random model's keys have subspaces that sums in
# another order turn: no product of basis and factor shows it, but codes of the basis alone do.
LOOSE = {"quantized_cache": 0.05, "xkv and int8": 0.05, "xkv pre and int4": 0.05}
