"""Functions for all families with a UNet."""

from __future__ import annotations

from typing import Any


def unet_divisor(pipe: Any) -> int:
    """The factor by which autoencoder and UNet together reduce the sides of an image."""
    return pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
