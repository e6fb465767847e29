"""An autoencoder with 2 × 2 pixels a latent, for the tests of cached latents."""

from typing import Any

import torch
from diffusers import AutoencoderKL


def vae(seed: int = 1, **changes: Any) -> AutoencoderKL:
    """Random weights, all of them disturbed; the same at each call."""
    options = {
        "block_out_channels": (8, 12),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 3,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 32,
    }
    torch.manual_seed(seed)
    model = AutoencoderKL(**{**options, **changes})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)
