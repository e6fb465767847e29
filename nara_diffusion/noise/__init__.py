"""λ, the noise level: its contexts, its sources, and its definitions."""
