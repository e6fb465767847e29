"""Tokens of latents: each 2 × 2 patch is one, as FLUX's and Qwen-Image's transformers read them."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """(b, c, h, w) → (b, h w / 4, 4 c), a token the channels of a patch, row by row within a channel."""
    b, c, h, w = latents.shape
    patches = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)  # (b, h / 2, w / 2, c, 2, 2)
    return patches.reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, for latents of this height and width."""
    b, _, c = tokens.shape
    patches = tokens.view(b, height // 2, width // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(b, c // 4, height, width)


def grid_ids(height: int, width: int, dimensions: int, device: torch.device) -> Tensor:
    """(h w, dimensions), 0 but for the row in column 1 and the column in column 2."""
    ids = torch.zeros(height, width, dimensions, device=device)
    ids[..., 1] = torch.arange(height, device=device)[:, None]
    ids[..., 2] = torch.arange(width, device=device)
    return ids.view(height * width, dimensions)
