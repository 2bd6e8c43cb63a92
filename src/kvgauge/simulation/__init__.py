"""Devices that are not there: what a cache does on one GPU or on several, shown on a machine without any."""
