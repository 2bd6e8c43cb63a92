"""transformers' own quantised cache under the same meter."""
