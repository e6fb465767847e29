"""Wrappers around PEFT's methods; `nara_diffusion.registry` installs them."""
