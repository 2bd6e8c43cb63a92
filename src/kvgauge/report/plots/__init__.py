"""The report's figures: each function takes rows and a `Palette` and returns a figure; `to_png` makes bytes of it."""

from kvgauge.report.plots.accuracy import accuracy_by_length, bytes_by_part, differences, pareto, pareto_by_task
from kvgauge.report.plots.fidelity import divergence, error_by_layer, error_by_rank
from kvgauge.report.plots.frontier import frontier
from kvgauge.report.plots.growth import growth
from kvgauge.report.plots.heatmap import heatmap
from kvgauge.report.plots.latency import latency_by_context
from kvgauge.report.plots.needle import needle
from kvgauge.report.plots.style import Palette, to_png

__all__ = [
    "Palette",
    "accuracy_by_length",
    "bytes_by_part",
    "differences",
    "divergence",
    "error_by_layer",
    "error_by_rank",
    "frontier",
    "growth",
    "heatmap",
    "latency_by_context",
    "needle",
    "pareto",
    "pareto_by_task",
    "to_png",
]
