"""Flux's relatives among the denoisers: arguments of a tiny one, and its inputs for a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_FLUX = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
}
_AXES = {"axes_dims_rope": (4, 4, 8)}


def _inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 8, 4),
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "img_ids": torch.arange(24.0).view(8, 3),
        "txt_ids": torch.zeros(5, 3),
    }


def _grid(batch: int) -> dict[str, Any]:
    return {"hidden_states": torch.randn(batch, 4, 4, 4), "encoder_hidden_states": torch.randn(batch, 5, 8)}


FLUXES: dict[str, tuple[dict[str, Any], Callable[[int], dict[str, Any]]]] = {
    "BriaTransformer2DModel": ({**_FLUX, **_AXES}, _inputs),
    "BriaFiboTransformer2DModel": (
        {**_FLUX, **_AXES, "text_encoder_dim": 6},
        lambda b: {**_inputs(b), "text_encoder_layers": [torch.randn(b, 5, 6) for _ in range(2)]},
    ),
    "BriaFibo2Transformer2DModel": (
        {
            "in_channels": 4,
            "dim": 48,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 8,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 2,
            "max_num_gist_tokens": 4,
            "gist_step": 1,
            "gist_min_text_len": 2,
            "gist_max_text_len": 8,
            "axes_dims": (8, 8, 8),
            "axes_lens": (16, 16, 16),
        },
        lambda b: {"hidden_states": torch.randn(b, 4, 4, 4), "encoder_hidden_states": torch.randn(b, 2, 5, 8)},
    ),
    "Flux3Transformer2DModel": (
        {**_FLUX, "cond_in_channels": 4, "timestep_channels": 8, "axes_dims_rope": (4, 4, 4, 4), "flow_map": True},
        lambda b: {
            "hidden_states": torch.randn(b, 8, 4),
            "encoder_hidden_states": torch.randn(b, 5, 12),
            "img_ids": torch.arange(32.0).view(8, 4),
            "txt_ids": torch.zeros(5, 4),
            "image_cond_hidden_states": torch.randn(b, 4, 4),
            "image_cond_ids": torch.arange(16.0).view(4, 4),
            "target_timestep": torch.full((b,), 0.1),
        },
    ),
    "LongCatImageTransformer2DModel": ({**_FLUX, **_AXES, "pooled_projection_dim": 12}, _inputs),
    "OvisImageTransformer2DModel": ({**_FLUX, **_AXES, "out_channels": 4}, _inputs),
    "ErnieImageTransformer2DModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "hidden_size": 24,
            "num_attention_heads": 2,
            "num_layers": 1,
            "ffn_hidden_size": 20,
            "text_in_dim": 8,
            "rope_axes_dim": (4, 4, 4),
        },
        lambda b: {
            "hidden_states": torch.randn(b, 4, 4, 4),
            "text_bth": torch.randn(b, 5, 8),
            "text_lens": torch.full((b,), 5),
        },
    ),
    "GlmImageTransformer2DModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "prior_vq_quantizer_codebook_size": 7,
        },
        lambda b: {
            **_grid(b),
            "prior_token_id": torch.arange(4).expand(b, -1),
            "prior_token_drop": torch.zeros(b, 4, dtype=torch.bool),
            "target_size": torch.full((b, 2), 4.0),
            "crop_coords": torch.zeros(b, 2),
        },
    ),
    "Ideogram4Transformer2DModel": (
        {
            "in_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "intermediate_size": 20,
            "adaln_dim": 6,
            "llm_features_dim": 12,
            "mrope_section": (4, 2, 2),
        },
        lambda b: {
            "hidden_states": torch.randn(b, 8, 4),
            "encoder_hidden_states": torch.randn(b, 8, 12),
            "position_ids": torch.arange(24).view(1, 8, 3).expand(b, -1, -1),
            "segment_ids": torch.ones(b, 8, dtype=torch.long),
            "indicator": torch.tensor([3] * 4 + [2] * 4).expand(b, -1),
        },
    ),
    "NucleusMoEImageTransformer2DModel": (
        {
            "in_channels": 4,
            "out_channels": 1,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 4, 8),
            "mlp_ratio": 6.0,
            "dense_moe_strategy": "leave_first_block_dense",
            "num_experts": 2,
            "moe_intermediate_dim": 6,
            "capacity_factors": [0.0, 1.0],
        },
        lambda b: {
            "hidden_states": torch.randn(b, 8, 4),
            "encoder_hidden_states": torch.randn(b, 5, 12),
            "encoder_hidden_states_mask": torch.ones(b, 5, dtype=torch.bool),
            "img_shapes": [(1, 2, 4)] * b,
        },
    ),
    "PRXTransformer2DModel": (
        {
            "in_channels": 4,
            "context_in_dim": 8,
            "hidden_size": 16,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 1,
            "axes_dim": [4, 4],
        },
        _grid,
    ),
    "QwenImage21Transformer2DModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "context_in_dim": 12,
            "axes_dims_rope": (4, 4, 8),
        },
        lambda b: {
            "hidden_states": torch.randn(b, 8, 4),
            "encoder_hidden_states": torch.randn(b, 5, 12),
            "img_mask": torch.tensor([[False] * 5 + [True] * 2]).expand(b, -1),
            "img_shapes": [[(1, 2, 4)]] * b,
        },
    ),
    "OmniGenTransformer2DModel": (
        {
            "in_channels": 4,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 12,
            "num_layers": 1,
            "pad_token_id": 0,
            "vocab_size": 9,
            "time_step_dim": 8,
            "pos_embed_max_size": 8,
            "rope_scaling": {"long_factor": [1] * 4, "short_factor": [1] * 4},
        },
        lambda b: {
            "hidden_states": torch.randn(b, 4, 4, 4),
            "input_ids": torch.arange(1, 5).expand(b, -1),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(b, 9, 9),
            "position_ids": torch.arange(9).expand(b, -1),
        },
    ),
}
