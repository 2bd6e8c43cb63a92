"""Tiny random models of many architectures: what is claimed of any decoder is tried on them.

Every one has 4 to 6 layers of hidden size 64, windows of 64 tokens where there are any, and norm weights, biases and
sink logits that are not what they start as: a weight of 1 would hide where it is applied.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kvgauge.errors import unknown

WINDOW = 64
NUDGE = 0.3  # standard deviation of what is added to every vector of parameters

BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "num_local_experts": 4,
}
GROUPED = EXPERTS | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
LATENTS: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
ALTERNATING = ["sliding_attention", "full_attention"]
HYBRID = ["linear_attention", "full_attention"]
SLIDING: dict[str, Any] = {"sliding_window": WINDOW}
BY_TYPE = SLIDING | {"layer_types": ALTERNATING * 2}
SHARING = SLIDING | {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": ALTERNATING * 3,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 320,
}


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0} | fields}


LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256)
LONGROPE = _rope(
    "longrope",
    short_factor=[1.0] * 8,
    long_factor=[1.5 + 0.5 * plane for plane in range(8)],
    original_max_position_embeddings=128,
    factor=16.0,
)

ARCHITECTURES: dict[str, dict[str, Any]] = {
    # grouped heads and their variants
    "llama": {"model_type": "llama"},
    "llama-biases-tied": {"model_type": "llama", "attention_bias": True, "tie_word_embeddings": True},
    "llama-llama3": {"model_type": "llama"} | LLAMA3,
    "llama-yarn": {"model_type": "llama"} | _rope("yarn", factor=4.0, original_max_position_embeddings=512),
    "llama-linear": {"model_type": "llama"} | _rope("linear", factor=4.0),
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "ministral3": {"model_type": "ministral3", "sliding_window": None},
    "mixtral": {"model_type": "mixtral"} | EXPERTS,
    "qwen2": {"model_type": "qwen2"},
    "qwen2_moe": {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 32} | EXPERTS,
    "qwen3": {"model_type": "qwen3"},
    "qwen3_moe": {"model_type": "qwen3_moe"} | EXPERTS,
    "gemma": {"model_type": "gemma"},
    "phi3": {"model_type": "phi3"},
    "phimoe": {"model_type": "phimoe"} | EXPERTS,
    "olmo": {"model_type": "olmo"},
    "olmo2": {"model_type": "olmo2"},
    "olmoe": {"model_type": "olmoe"} | EXPERTS,
    "flex_olmo": {"model_type": "flex_olmo"} | EXPERTS,
    "granite": {"model_type": "granite", "attention_multiplier": 0.2},
    "granitemoe": {"model_type": "granitemoe"} | EXPERTS,
    "granitemoeshared": {"model_type": "granitemoeshared", "shared_intermediate_size": 32} | EXPERTS,
    "seed_oss": {"model_type": "seed_oss"},
    "apertus": {"model_type": "apertus"},
    "arcee": {"model_type": "arcee"},
    "bitnet": {"model_type": "bitnet"},
    "hyperclovax": {"model_type": "hyperclovax"},
    "jais2": {"model_type": "jais2"},
    "solar_open": {"model_type": "solar_open"} | GROUPED,
    "dots1": {"model_type": "dots1"} | GROUPED,
    "doge": {"model_type": "doge"},
    "diffllama": {"model_type": "diffllama"},
    "hy_v3": {"model_type": "hy_v3"} | EXPERTS,
    "jetmoe": {"model_type": "jetmoe", "num_attention_heads": 8, "num_key_value_heads": 4, "kv_channels": 16} | EXPERTS,
    "dbrx": {
        "model_type": "dbrx",
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 2048,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    # neighbours rotate, a part of a head, nothing, backwards, a norm after it
    "cohere": {"model_type": "cohere"},
    "ernie4_5": {"model_type": "ernie4_5"} | _rope("default"),
    "ernie4_5_moe": {"model_type": "ernie4_5_moe", "moe_num_experts": 4, "moe_k": 2} | EXPERTS,
    "helium": {"model_type": "helium"},
    "hunyuan": {"model_type": "hunyuan_v1_dense"},
    "hunyuan_moe": {"model_type": "hunyuan_v1_moe", "moe_topk": 1} | EXPERTS,
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0]},
    "nanochat": {"model_type": "nanochat"},
    "glm": {"model_type": "glm", "partial_rotary_factor": 0.5},
    "glm4": {"model_type": "glm4", "partial_rotary_factor": 0.5},
    "glm4_moe": {"model_type": "glm4_moe", "partial_rotary_factor": 0.5, "use_qk_norm": True} | GROUPED,
    "phi": {"model_type": "phi", "partial_rotary_factor": 0.5},
    "phi3-partial": {"model_type": "phi3"} | _rope("default", partial_rotary_factor=0.5),
    "stablelm": {"model_type": "stablelm", "partial_rotary_factor": 0.25, "qk_layernorm": True},
    "nemotron": {"model_type": "nemotron", "partial_rotary_factor": 0.5},
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 0.25},
    "persimmon": {"model_type": "persimmon", "num_key_value_heads": 4},
    "minimax_m2": {"model_type": "minimax_m2"} | EXPERTS,
    # frequencies that depend on the length
    "llama-dynamic": {"model_type": "llama", "max_position_embeddings": 128} | _rope("dynamic", factor=4.0),
    "phi3-longrope": {"model_type": "phi3", "original_max_position_embeddings": 128} | LONGROPE,
    # windows and chunks, some with rotary bases of their own, capped scores or sink logits
    "mistral-window": {"model_type": "mistral"} | SLIDING,
    "ministral": {"model_type": "ministral"} | BY_TYPE,
    "qwen2-window": {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2} | SLIDING,
    "phi3-window": {"model_type": "phi3"} | SLIDING,
    "starcoder2": {"model_type": "starcoder2"} | SLIDING,
    "cohere2": {"model_type": "cohere2"} | SLIDING,
    "cwm": {"model_type": "cwm"} | BY_TYPE,
    "exaone4": {"model_type": "exaone4", "sliding_window_pattern": 2} | SLIDING,
    "afmoe": {"model_type": "afmoe", "num_dense_layers": 1} | BY_TYPE | EXPERTS,
    "olmo3": {"model_type": "olmo3"} | SLIDING,
    "gemma2": {"model_type": "gemma2", "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16} | SLIDING,
    "vaultgemma": {"model_type": "vaultgemma", "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16} | SLIDING,
    "gemma3": {"model_type": "gemma3_text", "query_pre_attn_scalar": 16} | BY_TYPE,
    "gemma3n": {"model_type": "gemma3n_text", "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 6} | SHARING,
    "gemma4": {"model_type": "gemma4_text", "global_head_dim": 32, "hidden_size_per_layer_input": 0} | BY_TYPE,
    "gemma4-shared": {"model_type": "gemma4_text", "global_head_dim": 32} | SHARING,
    "gpt_oss": {"model_type": "gpt_oss"} | SLIDING | EXPERTS,
    "granite_swa": {"model_type": "granite_swa"} | SLIDING,
    "mimo_v2_flash": {"model_type": "mimo_v2_flash", "v_head_dim": 24, "swa_v_head_dim": 24} | SLIDING | EXPERTS,
    "modernbert-decoder": {"model_type": "modernbert-decoder"},
    "llama4": {
        "model_type": "llama4_text",
        "attention_chunk_size": WINDOW,
        "intermediate_size_mlp": 96,
        "no_rope_layers": [1, 1, 1, 0],
        "interleave_moe_layer_step": 2,
    }
    | EXPERTS,
    # linear attention and state spaces beside attention
    "qwen3_next": {"model_type": "qwen3_next", "layer_types": HYBRID * 2, "shared_expert_intermediate_size": 32}
    | DELTA
    | EXPERTS,
    "qwen3_5": {"model_type": "qwen3_5_text", "layer_types": HYBRID * 2} | DELTA,
    "olmo_hybrid": {"model_type": "olmo_hybrid", "layer_types": HYBRID * 2} | DELTA | {"linear_num_key_heads": 4},
    "falcon_h1": {"model_type": "falcon_h1", "mamba_d_ssm": 64} | MAMBA | {"mamba_n_heads": 4},
    "jamba": {
        "model_type": "jamba",
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    }
    | EXPERTS,
    "bamba": {"model_type": "bamba", "attn_layer_indices": [1, 3]} | MAMBA,
    "granitemoehybrid": {
        "model_type": "granitemoehybrid",
        "layer_types": ["mamba", "attention"] * 2,
        "shared_intermediate_size": 32,
        "position_embedding_type": "rope",
    }
    | MAMBA
    | EXPERTS,
    "nemotron_h": {
        "model_type": "nemotron_h",
        "layers_block_type": ["mamba", "attention"] * 2,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
    },
    "lfm2": {"model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8},
    "lfm2_moe": {"model_type": "lfm2_moe", "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1}
    | EXPERTS,
    "kimi_linear": {"model_type": "kimi_linear", "layer_types": HYBRID * 2, "num_experts_per_token": 2}
    | LATENTS
    | GROUPED
    | {"q_lora_rank": None, "head_dim": 16, "linear_head_dim": 16, "linear_num_heads": 4},
    "recurrent_gemma": {
        "model_type": "recurrent_gemma",
        "attention_window_size": WINDOW,
        "lru_width": 64,
        "block_types": ["recurrent", "attention"],
    },
    # latents
    "deepseek_v2": {"model_type": "deepseek_v2", "topk_method": "greedy"} | GROUPED | LATENTS,
    "deepseek_v3": {"model_type": "deepseek_v3"} | GROUPED | LATENTS,
    "glm4_moe_lite": {"model_type": "glm4_moe_lite"} | GROUPED | LATENTS,
    "minicpm3": {"model_type": "minicpm3"} | LATENTS,
    "youtu": {"model_type": "youtu"} | LATENTS,
    "longcat_flash": {
        "model_type": "longcat_flash",
        "num_layers": 2,
        "zero_expert_num": 2,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
    }
    | GROUPED
    | LATENTS,
    "deepseek_v32": {"model_type": "deepseek_v32", "index_topk": 32, "index_head_dim": 16, "index_n_heads": 2}
    | GROUPED
    | LATENTS,
    # positions that are no rotation
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 2048},
    "gpt_bigcode": {"model_type": "gpt_bigcode", "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 2048},
    "opt": {"model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 64},
    "gptj": {"model_type": "gptj", "n_embd": 64, "n_layer": 4, "n_head": 4, "rotary_dim": 8, "n_positions": 2048},
    "bloom": {"model_type": "bloom", "n_layer": 4, "n_head": 4},
    "mpt": {"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 4, "max_seq_len": 2048},
}
"""Fields of transformers' configurations, added to `BASE`, by name."""


def zoo_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A model of `ARCHITECTURES`, as transformers itself runs it: float32, on the CPU, eager attention.

    Raises:
        UserError: there is none of that name.
    """
    if name not in ARCHITECTURES:
        raise unknown("architecture", name, ARCHITECTURES)
    fields = BASE | ARCHITECTURES[name]
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(NUDGE * torch.randn(parameter.shape))
    return model.eval().requires_grad_(False)
