"""The engine: prefill once, compress for every method, decode, keep every sample; and the statistics."""
