"""Block diffusion: what λ is worth to an adapter of a DiffusionGemma, whose canvas doesn't say how noisy it is."""
