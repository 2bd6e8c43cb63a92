"""The uncompressed cache: the reference that every method is measured against."""
