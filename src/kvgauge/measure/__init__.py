"""What a compressed cache costs and saves: bytes, time, memory, fidelity."""
