"""Spectra and cosines against direct computation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

import kvgauge
from kvgauge import UserError
from kvgauge.measure.asymmetry import Spectrum, cosine_rows, weight_rows
from kvgauge.report.plots.asymmetry import asymmetry
from kvgauge.report.plots.style import to_png


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return kvgauge.load_model("tiny/llama")[0]


def test_the_effective_rank_of_known_spectra() -> None:
    flat = Spectrum.of(torch.eye(8, 32), head_dim=8)
    assert flat.effective_rank == pytest.approx(1.0)
    assert flat.top_share(0.25) == pytest.approx(0.25)
    line = Spectrum.of(torch.outer(torch.arange(1.0, 9.0), torch.ones(32)), head_dim=8)
    assert line.effective_rank == pytest.approx(1 / 8, rel=1e-6)
    assert line.top_share(0.25) == pytest.approx(1.0)
    # two heads: one of each kind, and the means of their energies
    both = Spectrum.of(torch.cat([torch.eye(8, 32), torch.outer(torch.arange(1.0, 9.0), torch.ones(32))]), head_dim=8)
    assert both.energy[0] == pytest.approx((1 / 8 + 1) / 2)


def test_one_row_per_layer_and_projection(model: PreTrainedModel) -> None:
    rows = weight_rows(model)
    assert {(row["quantity"], row["layer"]) for row in rows} == {
        (name, layer) for name in ("W_Q", "W_K", "W_V") for layer in range(4)
    }
    assert all(0 < row["effective_rank"] <= 1 and len(row["energy"]) == 16 for row in rows)


def test_cosines_of_adjacent_tokens(model: PreTrainedModel) -> None:
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (2, 40))
    rows = cosine_rows(model, ids.split(1), distances=(1, 5))
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for row in rows:
        if row["quantity"] == "K":
            continue
        layer = cache.layers[row["layer"]]
        state = layer.keys if row["quantity"] == "K rotated" else layer.values
        cosine = functional.cosine_similarity(state[:, :, : -row["distance"]], state[:, :, row["distance"] :], dim=-1)
        assert row["cosine"] == pytest.approx(float(cosine.mean()), abs=1e-5)
        assert row["deviation"] == pytest.approx(float(cosine.std(unbiased=False)), abs=1e-5)


def test_keys_before_the_rotation_do_not_depend_on_the_position(model: PreTrainedModel) -> None:
    """The first layer's keys of one repeated token are all the same before the rotation, and differ after it."""
    rows = cosine_rows(model, [torch.full((1, 30), 17)], distances=(1, 7))
    first = {(row["quantity"], row["distance"]): row["cosine"] for row in rows if row["layer"] == 0}
    assert first["K", 1] == pytest.approx(1.0, abs=1e-5)
    assert first["K", 7] == pytest.approx(1.0, abs=1e-5)
    assert first["K rotated", 7] < 0.999


def test_short_sequences_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(UserError, match="use more than 64"):
        cosine_rows(model, [torch.full((1, 30), 17)])


def test_the_figure_is_the_same_bytes_for_the_same_rows(model: PreTrainedModel) -> None:
    rows = weight_rows(model) + cosine_rows(model, [torch.randint(3, 300, (1, 80))])
    assert to_png(asymmetry(rows)) == to_png(asymmetry(rows))
