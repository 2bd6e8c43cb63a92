"""Bandwidth: what a copy moves, what a step reads."""

from __future__ import annotations

import dataclasses

import torch

import kvgauge
from kvgauge.measure.bandwidth import copy_bandwidth, utilisation, weight_nbytes
from kvgauge.models.loading import model_spec


def test_copy_bandwidth_is_positive_and_finite() -> None:
    assert 0 < copy_bandwidth(torch.device("cpu"), nbytes=2**20, repeats=2) < float("inf")


def test_utilisation_is_the_share_of_the_bandwidth() -> None:
    assert utilisation(nbytes=50, seconds=2.0, bandwidth=100.0) == 0.25


def test_an_input_embedding_of_its_own_is_not_read_by_a_step(tiny) -> None:
    model = tiny("tiny/llama")
    total = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert weight_nbytes(model) == total - 320 * 64 * 4  # vocabulary × hidden size


def test_a_tied_embedding_is_the_output_layer_too() -> None:
    spec = model_spec("tiny/llama")
    tied = dataclasses.replace(spec, architecture=dict(spec.architecture or {}) | {"tie_word_embeddings": True})
    model = kvgauge.load_model(tied)[0]
    assert weight_nbytes(model) == sum(parameter.numel() * 4 for parameter in model.parameters())
