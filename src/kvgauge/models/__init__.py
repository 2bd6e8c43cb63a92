"""Loading models, and telling one from another."""
