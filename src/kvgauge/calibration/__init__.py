"""Calibration: corpora as token batches, and second moments of what attention sees."""
