"""How numbers are kept: growing buffers, packed bits, quantised rows, sparse rows, code books."""
