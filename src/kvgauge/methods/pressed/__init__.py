"""Eviction by the presses of kvpress."""
