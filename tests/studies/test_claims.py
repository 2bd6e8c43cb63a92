"""The study of the papers' observations on a tiny model."""

from __future__ import annotations

import pytest
import torch

import kvgauge
from pipelines.studies.claims import across_layers, asymmetry, interval, per_head


@pytest.fixture(scope="module")
def model():
    return kvgauge.load_model("tiny/llama")[0]


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 300, (2, 96), generator=torch.Generator().manual_seed(0))


def test_an_interval_holds_its_mean_and_keeps_to_the_bounds() -> None:
    found = interval([0.0, 1.0, 1.0, 1.0], (0.0, 1.0))
    assert found["mean"] == 0.75
    assert 0.0 <= found["low"] < 0.75 < found["high"] <= 1.0


def test_on_the_tokens_of_the_fit_kqsvd_is_below_both_in_every_layer(model, tokens) -> None:
    found = per_head(model, tokens, tokens)
    rows = [row for row in found["errors"] if row["quantity"] == "KQ"]
    assert rows
    for row in rows:
        assert row["layers"] == 4
        assert row["kqsvd"] < min(row["ksvd"], row["eigen"])
        assert row["below_ksvd"]["mean"] == row["below_eigen"]["mean"] == 1.0
    assert set(found["epsilon_ranks"]) == {"ksvd", "eigen", "kqsvd"}
    assert all(1 <= rank <= 16 for ranks in found["epsilon_ranks"].values() for rank in ranks.values())


def test_layers_and_neighbours(model, tokens) -> None:
    found = across_layers(model, tokens)
    assert found["unrelated_subspaces"] == found["rank"] / 96
    assert set(found["adjacent_layers"]) >= {"keys_cosine", "keys_cka", "keys_subspace", "values_subspace"}
    found = asymmetry(model, tokens)
    assert set(found["cosine"]) == {f"{name} at {far}" for name in ("K", "K rotated", "V") for far in (1, 64)}
    assert 0 < found["effective_rank"]["W_V"]["mean"] <= 1
