"""The figure of the alignment has a panel per matrix, all on one scale, and is drawn alike every time."""

from __future__ import annotations

import numpy as np
import pytest

from kvgauge.report.plots.alignment import MEASURES, alignment
from kvgauge.report.plots.style import to_png

MATRICES = {f"{kind}_{measure}": np.eye(5) * 0.5 + 0.5 for kind in ("keys", "values") for measure in MEASURES}


def test_a_panel_per_matrix_on_one_scale():
    images = [axes.images[0] for axes in alignment(MATRICES).axes if axes.images]
    assert len(images) == 6
    assert {image.get_clim() for image in images} == {(0.0, 1.0)}


def test_drawn_alike():
    assert to_png(alignment(MATRICES)) == to_png(alignment(MATRICES))


def test_a_missing_matrix_is_an_error():
    with pytest.raises(KeyError):
        alignment({name: matrix for name, matrix in MATRICES.items() if name != "values_cka"})
