"""What a method's bytes are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import kvgauge
from kvgauge.architecture.facts import model_facts
from kvgauge.contract.budget import reference_nbytes
from kvgauge.contract.method import Needs
from kvgauge.methods.exact.full import Full


@dataclass(frozen=True, kw_only=True)
class HalfPrecision(Full):
    """A method that is measured against 16 bits a number."""

    name: str = "half_precision"

    @property
    def needs(self) -> Needs:
        return Needs(reference_bits=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_compared_with_the_model_s_dtype_or_the_method_s(dtype):
    model, _ = kvgauge.load_model("tiny/llama", dtype=str(dtype).removeprefix("torch."))
    facts = model_facts(model)
    numbers = 4 * 2 * 2 * 16 * 100  # layers, keys and values, heads, head_dim, tokens
    assert reference_nbytes(Full(), facts, 100) == kvgauge.full_nbytes(model, 100) == numbers * dtype.itemsize
    assert reference_nbytes(HalfPrecision(), facts, 100) == kvgauge.full_nbytes(model, 100, bits=16) == numbers * 2
