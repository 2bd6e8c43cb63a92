"""KVQuant: non-uniform codes of keys per channel and of values per token."""
