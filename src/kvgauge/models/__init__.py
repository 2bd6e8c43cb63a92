"""Loading models and the few facts that methods need of an architecture."""
