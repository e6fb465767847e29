"""A random UNet of Diffusers of two levels, the first with attention."""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from torch import nn


def tiny_unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
    ).eval()
