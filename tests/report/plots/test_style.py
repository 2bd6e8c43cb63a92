"""One colour and marker per method, and pictures whose bytes depend on nothing else."""

from __future__ import annotations

import matplotlib
from matplotlib.figure import Figure

from kvgauge.report.plots import Palette, heatmap, to_png
from kvgauge.report.plots.style import grid


def test_methods_differ_and_the_baseline_is_a_black_star() -> None:
    methods = [f"method{index}" for index in range(40)]
    palette = Palette([*methods, "full"])
    assert len({(palette[method].colour, palette[method].marker) for method in methods}) == 40
    assert (palette["full"].colour, palette["full"].marker) == ("#000000", "*")


def test_styles_do_not_depend_on_the_order_of_methods() -> None:
    one, other = Palette(["xkv", "kqsvd", "full"]), Palette(["full", "kqsvd", "xkv"])
    assert all(one[method] == other[method] for method in ("xkv", "kqsvd", "full"))


def test_moved_data_are_in_sight() -> None:
    palette = Palette(["a", "b"])
    axes = Figure().subplots()
    axes.plot([50.0, 60.0], [7.0, 9.0], transform=palette.apart("a", axes, [50.0, 60.0], [7.0, 9.0]))
    assert axes.get_xlim()[0] <= 50.0 < 60.0 <= axes.get_xlim()[1]
    assert axes.get_ylim()[0] <= 7.0 < 9.0 <= axes.get_ylim()[1]


def test_the_readers_settings_change_no_picture() -> None:
    plain = to_png(heatmap([[0.0, 1.0]], "m"))
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False, "savefig.dpi": 50}):
        assert to_png(heatmap([[0.0, 1.0]], "m")) == plain
    assert b"Software" not in plain
    assert b"Date" not in plain


def test_surplus_panels_are_taken_away() -> None:
    figure, axes = grid(5, 4, sharex=True)
    assert len(axes) == len(figure.axes) == 5
