"""What a quantiser accepts, and the storage it asks for."""

from __future__ import annotations

import pytest

from kvgauge import configuration
from kvgauge.errors import UserError
from kvgauge.methods.quantizers import UniformQuantizer
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
