"""What a quantiser accepts, and the storage it asks for."""

from __future__ import annotations

import pytest
import torch

from kvgauge import configuration
from kvgauge.errors import UserError
from kvgauge.methods.quantizers import Kivi, TurboQuant, UniformQuantizer
from kvgauge.store.storage import QuantizedStorage


@pytest.mark.parametrize("name", ["int8", "int4", "int3", "int2"])
def test_a_name_is_a_number_of_bits(name):
    quantizer = configuration.build(configuration.read("quantizer", name), "quantiser")
    assert quantizer.label == name
    assert quantizer.storage() == QuantizedStorage(int(name[3:]))
    assert quantizer.storage().reference_bits == 16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 5}, "bits 5 of a quantiser: there is storage for 2, 3, 4, 8 bits"),
        ({"bits": 16}, "bits 16"),
        ({"bits": 4, "axis": "tokens"}, "unknown axis of a quantiser 'tokens': did you mean 'token'"),
        ({"bits": 4, "group": 0}, "group 0 of int4 is below 1"),
        ({"bits": 4, "axis": "channel", "balance": True}, "balance of int4 has no use with axis: channel"),
    ],
)
def test_bad_values_are_one_line(fields, message):
    with pytest.raises(UserError, match=message) as refusal:
        UniformQuantizer(**fields)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (UniformQuantizer, {"bits": 4, "rotate": "hadamar"}, "unknown rotate of int4-hadamar 'hadamar': did you mean"),
        (UniformQuantizer, {"bits": 4, "rotate": "hadamard", "axis": "channel"}, "rotate of int4-hadamard makes all"),
        (UniformQuantizer, {"bits": 4, "rotate": "hadamard", "balance": True}, "leave them out"),
        (Kivi, {"bits": 5}, "bits 5 of a quantiser: there is storage for 2, 3, 4, 8 bits"),
        (Kivi, {"group": 0}, "group 0 of kivi is below 1"),
        (Kivi, {"residual": 50}, "residual 50 of kivi is no number of groups of 32 tokens.*: give 32 or 64"),
        (Kivi, {"residual": -1}, "give 0 or 32"),
        (TurboQuant, {"bits": 2.7}, "bits 2.7 of a quantiser: there is storage for 2, 2.5, 3, 3.5, 4 bits"),
        (TurboQuant, {"key_bits": 8}, "bits 8 of a quantiser"),
        (TurboQuant, {"mode": "pro"}, "unknown mode of turboquant 'pro': did you mean 'prod'"),
        (TurboQuant, {"rotate": "givens"}, "unknown rotate of turboquant 'givens'"),
    ],
)
def test_bad_values_of_the_others_are_one_line(cls, fields, message):
    with pytest.raises(UserError, match=message) as refusal:
        cls(**fields)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("kivi2", "kivi2"),
        ("kivi4", "kivi4"),
        ("turboquant", "turboquant3"),
        ("turboquant_prod", "turboquant-prod3"),
        ("int4_rotated", "int4-hadamard"),
    ],
)
def test_names_of_the_others(name, label):
    quantizer = configuration.build(configuration.read("quantizer", name), "quantiser")
    assert quantizer.label == label
    assert quantizer.storage().reference_bits == 16


def test_keys_and_values_have_bits_of_their_own():
    quantizer = TurboQuant(key_bits=4, value_bits=2.5)
    assert quantizer.label == "turboquantk4v2.5"
    storage = quantizer.storage()
    assert (storage.rows(part="keys").bits, storage.rows(part="values").bits) == (4, 2.5)
    keys, values = (storage.rows_nbytes(100, 64, torch.float32, part=part) for part in ("keys", "values"))
    assert (keys, values) == (100 * (32 + 2), 100 * (12 + 8 + 2))
