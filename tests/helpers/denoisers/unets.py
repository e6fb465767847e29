"""UNets among the denoisers, beside Stable Diffusion's: arguments of a tiny one, and its inputs for a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "cross_attention_dim": 6,
}


def _inputs(batch: int) -> dict[str, Any]:
    return {"sample": torch.randn(batch, 4, 8, 8), "encoder_hidden_states": torch.randn(batch, 5, 6)}


MORE_UNETS: dict[str, tuple[dict[str, Any], Callable[[int], dict[str, Any]]]] = {
    "AudioLDM2UNet2DConditionModel": (
        {
            **_UNET,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 2,
            "cross_attention_dim": ((None, 6, 6), (None, 6, 6)),
        },
        lambda b: {**_inputs(b), "encoder_hidden_states_1": torch.randn(b, 3, 6)},
    ),
    "DreamLiteUNetModel": (
        {
            **_UNET,
            "block_out_channels": (8, 16, 16),
            "attention_head_dim": 4,
            "cross_attention_dim": 6,
        },
        _inputs,
    ),
    "I2VGenXLUNet": (
        {
            **_UNET,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "attention_head_dim": 2,
        },
        lambda b: {
            "sample": torch.randn(b, 4, 4, 8, 8),
            "fps": torch.full((b,), 7),
            "image_latents": torch.randn(b, 4, 4, 8, 8),
            "image_embeddings": torch.randn(b, 6),
            "encoder_hidden_states": torch.randn(b, 5, 6),
        },
    ),
    "Kandinsky3UNet": (
        {
            "in_channels": 4,
            "time_embedding_dim": 8,
            "groups": 2,
            "attention_head_dim": 4,
            "layers_per_block": 2,
            "block_out_channels": (8, 16),
            "cross_attention_dim": 8,
            "encoder_hid_dim": 6,
        },
        lambda b: {
            "sample": torch.randn(b, 4, 16, 16),
            "encoder_hidden_states": torch.randn(b, 5, 6),
            "encoder_attention_mask": torch.ones(b, 5),
        },
    ),
    "UNetControlNetXSModel": (
        {
            "sample_size": 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (4, 8),
            "norm_num_groups": 2,
            "cross_attention_dim": 6,
            "num_attention_heads": 2,
            "ctrl_conditioning_embedding_out_channels": (2, 2),
            "ctrl_block_out_channels": (4, 4),
            "ctrl_num_attention_heads": 2,
            "ctrl_max_norm_num_groups": 2,
            "upcast_attention": False,
        },
        lambda b: {**_inputs(b), "controlnet_cond": torch.randn(b, 3, 16, 16)},
    ),
    "UNetSpatioTemporalConditionModel": (
        {
            **{key: value for key, value in _UNET.items() if key != "norm_num_groups"},
            "in_channels": 8,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "block_out_channels": (32, 64),
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 12,
            "num_attention_heads": 2,
            "num_frames": 4,
        },
        lambda b: {
            "sample": torch.randn(b, 4, 8, 8, 8),
            "encoder_hidden_states": torch.randn(b, 1, 6),
            "added_time_ids": torch.ones(b, 3),
        },
    ),
    "StableCascadeUNet": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "timestep_ratio_embedding_dim": 8,
            "conditioning_dim": 8,
            "block_out_channels": (8, 16),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "clip_text_in_channels": 6,
            "clip_text_pooled_in_channels": 5,
            "clip_image_in_channels": 5,
            "clip_seq": 2,
            "switch_level": (False,),
        },
        lambda b: {
            "sample": torch.randn(b, 4, 4, 4),
            "clip_text_pooled": torch.randn(b, 1, 5),
            "clip_text": torch.randn(b, 3, 6),
            "clip_img": torch.randn(b, 1, 5),
        },
    ),
    "WuerstchenPrior": (
        {"c_in": 4, "c": 8, "c_cond": 6, "c_r": 8, "depth": 1, "nhead": 2},
        lambda b: {"x": torch.randn(b, 4, 4, 4), "c": torch.randn(b, 3, 6)},
    ),
    "WuerstchenDiffNeXt": (
        {
            "c_r": 8,
            "c_cond": 6,
            "c_hidden": [8, 16],
            "nhead": [-1, 2],
            "blocks": [1, 1],
            "level_config": ["CT", "CTA"],
            "inject_effnet": [False, True],
            "effnet_embd": 3,
            "clip_embd": 6,
        },
        lambda b: {
            "x": torch.randn(b, 4, 8, 8),
            "effnet": torch.randn(b, 3, 2, 2),
            "clip": torch.randn(b, 3, 6),
        },
    ),
}
