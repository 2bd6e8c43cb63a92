"""Fits of growth: known laws come back."""

from __future__ import annotations

import json

import pytest

import kvgauge
from pipelines.studies.scaling import growths, power_law, write


def rows(lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)) -> list[dict[str, object]]:
    return [
        {
            "cell": cell,
            "batch": 1,
            "context_length": length,
            "ttft_s": None if cell == "kqsvd@0.5" else 1e-6 * length**1.5,
            "tpot_median_s": 0.02 + 1e-6 * length * share,
            "nbytes": int(1000 * length * share),
            "peak_bytes": 10**9 + 2000 * length,
            "before_bytes": 10**9,
        }
        for cell, share in (("full", 1.0), ("kqsvd@0.5", 0.5))
        for length in lengths
    ]


def test_a_power_law_comes_back() -> None:
    exponent, r_squared = power_law([1, 2, 4, 8], [3.0, 3.0 * 2**1.3, 3.0 * 4**1.3, 3.0 * 8**1.3])
    assert exponent == pytest.approx(1.3)
    assert r_squared == pytest.approx(1.0)


def test_every_quantity_of_every_cell_is_fitted() -> None:
    found = {(growth.cell, growth.quantity): growth for growth in growths(rows())}
    assert len(found) == 7  # one cell has no time to first token
    assert found["full", "ttft_s"].exponent == pytest.approx(1.5)
    assert found["full", "nbytes"].exponent == pytest.approx(1.0)
    assert found["full", "peak_bytes"].exponent == pytest.approx(1.0)
    step = found["kqsvd@0.5", "tpot_median_s"]
    assert step.exponent < 1.0
    assert (step.constant, step.per_token) == (pytest.approx(0.02), pytest.approx(0.5e-6))


def test_a_run_gets_its_fits_and_its_figure(tmp_path) -> None:
    (tmp_path / "latency.json").write_text(json.dumps(rows()))
    found = write(tmp_path)
    assert len(json.loads((tmp_path / "scaling.json").read_text())) == len(found) == 7
    first = (tmp_path / "scaling.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    write(tmp_path)
    assert (tmp_path / "scaling.png").read_bytes() == first


def test_one_context_length_is_refused(tmp_path) -> None:
    (tmp_path / "latency.json").write_text(json.dumps(rows(lengths=(1024,))))
    with pytest.raises(kvgauge.UserError, match=r"several latency\.context_lengths"):
        write(tmp_path)
