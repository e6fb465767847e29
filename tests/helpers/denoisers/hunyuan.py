"""HunyuanVideo's relatives among the denoisers: arguments of a tiny one, and its inputs for a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "text_embed_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}


def _text(batch: int) -> dict[str, Any]:
    return {"encoder_hidden_states": torch.randn(batch, 5, 8), "encoder_attention_mask": torch.ones(batch, 5)}


def _video(batch: int) -> dict[str, Any]:
    return {"hidden_states": torch.randn(batch, 4, 2, 4, 4), **_text(batch)}


HUNYUANS: dict[str, tuple[dict[str, Any], Callable[[int], dict[str, Any]]]] = {
    "HunyuanImageTransformer2DModel": (
        {
            **_HUNYUAN,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "guidance_embeds": True,
            "text_embed_2_dim": 6,
            "rope_axes_dim": (4, 6),
        },
        lambda b: {
            "hidden_states": torch.randn(b, 4, 4, 4),
            **_text(b),
            "encoder_hidden_states_2": torch.randn(b, 3, 6),
            "encoder_attention_mask_2": torch.ones(b, 3),
            "guidance": torch.full((b,), 3.0),
        },
    ),
    "HunyuanVideo15Transformer3DModel": (
        {**_HUNYUAN, "num_refiner_layers": 1, "text_embed_2_dim": 6, "image_embed_dim": 7, "use_meanflow": True},
        lambda b: {
            **_video(b),
            "encoder_hidden_states_2": torch.randn(b, 3, 6),
            "encoder_attention_mask_2": torch.ones(b, 3),
            "image_embeds": torch.randn(b, 3, 7),
            "timestep_r": torch.full((b,), 5.0),
        },
    ),
    "HunyuanVideoFramepackTransformer3DModel": (
        {
            **_HUNYUAN,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "pooled_projection_dim": 6,
            "has_image_proj": True,
            "image_proj_dim": 7,
            "has_clean_x_embedder": True,
        },
        lambda b: {
            **_video(b),
            "pooled_projections": torch.randn(b, 6),
            "image_embeds": torch.randn(b, 3, 7),
            "indices_latents": torch.arange(4, 6),
            "guidance": torch.full((b,), 3.0),
            "latents_clean": torch.randn(b, 4, 2, 4, 4),
            "indices_latents_clean": torch.arange(2),
            "latents_history_2x": torch.randn(b, 4, 2, 4, 4),
            "indices_latents_history_2x": torch.arange(2),
            "latents_history_4x": torch.randn(b, 4, 4, 4, 4),
            "indices_latents_history_4x": torch.arange(4),
        },
    ),
    "MotifVideoTransformer3DModel": (
        {**_HUNYUAN, "num_single_layers": 1, "image_embed_dim": 7},
        lambda b: {**_video(b), "image_embeds": torch.randn(b, 3, 7)},
    ),
    "EasyAnimateTransformer3DModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "mmdit_layers": 1,
            "time_embed_dim": 4,
            "text_embed_dim": 8,
        },
        lambda b: {"hidden_states": torch.randn(b, 4, 2, 4, 4), "encoder_hidden_states": torch.randn(b, 5, 8)},
    ),
    "JoyImageEditTransformer3DModel": (
        {
            "in_channels": 4,
            "hidden_size": 20,
            "num_attention_heads": 2,
            "text_dim": 8,
            "mlp_width_ratio": 2.0,
            "num_layers": 1,
            "rope_dim_list": [2, 4, 4],
        },
        lambda b: {"hidden_states": torch.randn(b, 1, 4, 2, 4, 4), "encoder_hidden_states": torch.randn(b, 5, 8)},
    ),
    "JoyImageEditPlusTransformer3DModel": (
        {
            "in_channels": 4,
            "hidden_size": 20,
            "num_attention_heads": 2,
            "text_dim": 8,
            "mlp_width_ratio": 2.0,
            "num_layers": 1,
            "rope_dim_list": [2, 4, 4],
        },
        lambda b: {
            "hidden_states": torch.randn(b, 8, 4, 1, 2, 2),
            "encoder_hidden_states": torch.randn(b, 5, 8),
            "shape_list": [[(1, 2, 2), (1, 2, 2)]] * b,
        },
    ),
}
