"""What the cache of a layer is made of, and the cache of a whole model."""
