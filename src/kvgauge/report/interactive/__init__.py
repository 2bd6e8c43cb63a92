"""Figures that answer the mouse: what they draw (`points`), how (`scatter`), and the script that does (`vega_script`).

A figure is a Vega specification in plain data, so that the same rows give the same bytes. Its colours are those of the
page (CSS variables), so that it follows the reader's colour scheme.
"""

from kvgauge.report.interactive.points import legend, points
from kvgauge.report.interactive.scatter import score_against_bytes, score_against_time
from kvgauge.report.interactive.script import vega_script

__all__ = ["legend", "points", "score_against_bytes", "score_against_time", "vega_script"]
