"""Conversations about one compressed context, the last question of which needs the first answer."""

from kvgauge.benchmarks.multi_turn.multi_turn import MultiTurn

__all__ = ["MultiTurn"]
