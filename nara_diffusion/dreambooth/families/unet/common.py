"""Functions that the families with a UNet share."""

from __future__ import annotations

from typing import Any


def unet_divisor(pipe: Any) -> int:
    """Return the number by which autoencoder and UNet together divide the sides of an image."""
    return pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
