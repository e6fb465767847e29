"""Schedulers: what the running one means by a timestep, and what it expects the denoiser to predict."""
