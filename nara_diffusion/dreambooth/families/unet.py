"""What the families with a UNet share."""

from __future__ import annotations

from typing import Any


def unet_divisor(pipe: Any) -> int:
    """What autoencoder and UNet divide an image by, together."""
    return pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
