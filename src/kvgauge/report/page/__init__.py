"""One HTML page that opens from disk: pictures, tables, figures and scripts are inside it, and it asks no network."""

from kvgauge.report.page.blocks import Block, Card, Cards, HeatMap, HeatMaps, Item, Scatter, Section, slug
from kvgauge.report.page.rendering import render

__all__ = ["Block", "Card", "Cards", "HeatMap", "HeatMaps", "Item", "Scatter", "Section", "render", "slug"]
