"""Low rank per head: K-SVD, Eigen and KQ-SVD, and the caches of their latents."""
