"""Products of a handful of rows, compiled for the CPU at hand; torch's own products do the same, slower."""
