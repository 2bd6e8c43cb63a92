"""The study of what merging costs: its oracle, its pairing and its whole run on a tiny model."""

from __future__ import annotations

import argparse

import pytest
import torch

import kvgauge
from kvgauge import UserError
from kvgauge.measure.fidelity import observe
from pipelines.studies.merging_fidelity import VARIANTS, against_first, one_merge, run, variant


def test_one_merge_that_merges_nothing_has_no_error_and_eviction_has_that_of_the_tokens_left_out() -> None:
    model = kvgauge.load_model("tiny/llama")[0]
    ids = torch.randint(3, 300, (1, 60), generator=torch.Generator().manual_seed(0))
    seen = observe(model, ids)[1]
    for name in VARIANTS:
        method = variant(name, max_entries=50, window=50, start=4, budget=None)
        assert one_merge(model, method, seen, 50, 1.0) < 1e-5
        assert one_merge(model, method, seen, 50, 0.4) > 1e-3


def test_ratios_are_paired_with_the_first() -> None:
    rows = against_first({"a": [1.0, 2.0, 4.0], "b": [0.5, 4.0, 2.0]})
    assert rows["a"]["ratio"] == 1.0
    assert rows["b"]["ratio"] == pytest.approx(2 ** (-1 / 3))
    assert rows["b"]["better_on"] == 2


def options(**changes: object) -> argparse.Namespace:
    plain = {
        "model": "tiny/llama",
        "tokens": 96,
        "continuation": 16,
        "contexts": 2,
        "share": 0.75,
        "window": 16,
        "seed": 0,
        "variants": ["chain-clip", "published"],
    }
    return argparse.Namespace(**(plain | changes))


def test_a_whole_run() -> None:
    found = run(options())
    assert list(found["kl"]) == ["chain-clip", "published"]
    assert len(found["kl"]["published"]["each"]) == 2
    assert all(error > 0 for error in found["one_merge_output_error"]["published"]["each"])


def test_an_unknown_variant_is_one_line() -> None:
    with pytest.raises(UserError, match="variant"):
        run(options(variants=["chains"]))
