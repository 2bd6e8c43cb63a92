"""What a method, a benchmark and their parts promise each other."""
