"""The storage that methods share: growing buffers, latents, and the attention that reads them."""
