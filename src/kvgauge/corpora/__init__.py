"""Texts: where they come from, and token sequences of one length to calibrate on."""
