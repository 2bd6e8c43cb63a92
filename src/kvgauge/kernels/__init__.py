"""Compiled kernels, and which of them answers on which device."""
