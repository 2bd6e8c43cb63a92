"""Benchmarks: the prompts that every method meets, and how their answers are scored."""
