"""How cached tokens are read: the seam with transformers, segments under one softmax, counted attention."""
