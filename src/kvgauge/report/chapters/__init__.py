"""The page's chapters, a file each: every one writes its blocks and pictures into a `Draft`."""

from kvgauge.report.chapters.accuracy import accuracy
from kvgauge.report.chapters.best_cells import best_cells
from kvgauge.report.chapters.costs import costs
from kvgauge.report.chapters.draft import Draft
from kvgauge.report.chapters.fidelity import fidelity
from kvgauge.report.chapters.frontier import frontier
from kvgauge.report.chapters.growth import growth
from kvgauge.report.chapters.latency import latency
from kvgauge.report.chapters.needle import needle

__all__ = ["Draft", "accuracy", "best_cells", "costs", "fidelity", "frontier", "growth", "latency", "needle"]
