"""From the stages' files to one page: `build_report` reads, tabulates, draws and writes."""

from kvgauge.report.build import build_report

__all__ = ["build_report"]
