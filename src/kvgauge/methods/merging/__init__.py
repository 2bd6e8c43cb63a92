"""Fewer entries than tokens: KVSlimmer, AsymKV, plain merging and StreamingLLM."""
