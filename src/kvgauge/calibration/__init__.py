"""Second moments of what attention sees, and what is learnt from them: metrics, losses of ranks, allocations."""
