"""The rotation is the model's own, and its inverse is exact."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvgauge.architecture.rotary import Rotary
from kvgauge.errors import UserError
from kvgauge.models.loading import load_model


@pytest.mark.parametrize("name", ["tiny/llama", "tiny/qwen3"])
def test_rotation_and_its_inverse(name, tiny):
    model = tiny(name)
    rotary = Rotary(model)
    states = torch.randn(2, 3, 40, 16)
    positions = torch.stack([torch.arange(40), torch.arange(40) + 1000])
    cos, sin = model.model.rotary_emb(states, position_ids=positions)
    expected, _ = apply_rotary_pos_emb(states, states, cos, sin)
    torch.testing.assert_close(rotary.rotate(states, positions), expected)
    torch.testing.assert_close(rotary.unrotate(expected, positions), states, rtol=1e-4, atol=1e-5)


def test_the_attention_factor_of_yarn_is_undone():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "rope_theta": 10000.0}
    architecture = {
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": scaling,
    }
    model, _ = load_model("tiny/llama", architecture=architecture)
    assert model.model.rotary_emb.attention_scaling != 1.0
    rotary = Rotary(model)
    states, positions = torch.randn(1, 2, 30, 16), torch.arange(30)[None]
    torch.testing.assert_close(
        rotary.unrotate(rotary.rotate(states, positions), positions), states, rtol=1e-4, atol=1e-5
    )


def test_length_dependent_rotations_are_refused():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    architecture = {"model_type": "llama", "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 1}
    architecture |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": scaling}
    model, _ = load_model("tiny/llama", architecture=architecture)
    with pytest.raises(UserError, match="changes with the sequence length"):
        Rotary(model)
