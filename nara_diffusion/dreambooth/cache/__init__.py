"""Latents and prompt embeddings, computed once."""
