"""Latents as tokens, one for each patch of 2 × 2, for the transformers of FLUX and Qwen-Image."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """(b, c, h, w) → (b, h w / 4, 4 c): a token has the 2 × 2 values of each channel of a patch, row by row."""
    b, c, h, w = latents.shape
    patches = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)  # (b, h / 2, w / 2, c, 2, 2)
    return patches.reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, for latents of this height and width."""
    b, _, c = tokens.shape
    patches = tokens.view(b, height // 2, width // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(b, c // 4, height, width)


def grid_ids(height: int, width: int, dimensions: int, device: torch.device) -> Tensor:
    """Positions (h w, dimensions): the row in column 1, the column in column 2, and else 0."""
    ids = torch.zeros(height, width, dimensions, device=device)
    ids[..., 1] = torch.arange(height, device=device)[:, None]
    ids[..., 2] = torch.arange(width, device=device)
    return ids.view(height * width, dimensions)
