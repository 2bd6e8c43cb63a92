"""Products of a handful of rows, compiled for the CPU that runs them; batched products do the same where none can be."""
