"""Matrices are drawn on the scale that was asked for, and nothing else is drawn."""

from __future__ import annotations

import numpy as np
import pytest

from kvgauge.report.plots import heatmap


def limits(**options: object) -> tuple[float, float]:
    figure = heatmap([[-1.0, 2.0], [np.nan, 0.0]], "m", **options)  # type: ignore[arg-type]
    low, high = figure.axes[0].images[0].get_clim()
    return float(low), float(high)


def test_limits() -> None:
    assert limits() == (-1.0, 2.0)
    assert limits(diverging=True) == (-2.0, 2.0)
    assert limits(limits=(0.0, 1.0)) == (0.0, 1.0)


@pytest.mark.parametrize("matrix", [[1.0, 2.0], [[np.nan]]])
def test_what_cannot_be_drawn_is_refused(matrix: list[object]) -> None:
    with pytest.raises(ValueError, match="heat map"):
        heatmap(matrix, "m")  # type: ignore[arg-type]
