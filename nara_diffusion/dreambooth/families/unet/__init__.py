"""Stable Diffusion 1, 2 and XL: a UNet, and prompts that CLIP reads, also in chunks."""
