"""What formulas on paper need of a model: its shapes and the bytes of its weights, without the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from kvgauge.architecture.facts import ModelFacts, model_facts
from kvgauge.measure.bandwidth import weight_nbytes


@dataclass(frozen=True)
class Shape:
    """What the formulas need of a model.

    Attributes:
        facts: of its attention.
        weight_nbytes: all parameters.
        read_nbytes: the parameters that a decode step reads.
        intermediate_size: of its feed-forward blocks.
    """

    facts: ModelFacts
    weight_nbytes: int
    read_nbytes: int
    intermediate_size: int

    @classmethod
    def of(cls, config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> Shape:
        """The shape of an architecture; its weights are counted, not made."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        return cls(model_facts(model), total, weight_nbytes(model), config.get_text_config().intermediate_size)
