"""Families of image models: how each encodes prompts, makes latents and calls its denoiser."""
