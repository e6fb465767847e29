"""The transformers of images among the denoisers: arguments of a tiny one, and its inputs for a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

_FLUX = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
}


def _flux_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 8, 4),
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "img_ids": torch.arange(24.0).view(8, 3),
        "txt_ids": torch.zeros(5, 3),
    }


IMAGES: dict[str, tuple[dict[str, Any], Callable[[int], dict[str, Any]]]] = {
    # discrete schedules
    "PixArtTransformer2DModel": (
        {
            "sample_size": 8,
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 8,
        },
        lambda b: {
            "hidden_states": torch.randn(b, 4, 8, 8),
            "encoder_hidden_states": torch.randn(b, 5, 8),
            "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
        },
    ),
    "HunyuanDiT2DModel": (
        {
            "sample_size": 8,
            "num_layers": 1,
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "hidden_size": 16,
            "text_len": 4,
            "text_len_t5": 4,
        },
        lambda b: {
            "hidden_states": torch.randn(b, 4, 8, 8),
            "encoder_hidden_states": torch.randn(b, 4, 8),
            "text_embedding_mask": torch.ones(b, 4),
            "encoder_hidden_states_t5": torch.randn(b, 4, 8),
            "text_embedding_mask_t5": torch.ones(b, 4),
            "image_meta_size": torch.ones(b, 6),
            "style": torch.zeros(b, dtype=torch.long),
            "image_rotary_emb": (torch.ones(16, 8), torch.zeros(16, 8)),
        },
    ),
    "CogView4Transformer2DModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "rope_axes_dim": (8, 8),
        },
        lambda b: {
            "hidden_states": torch.randn(b, 4, 4, 4),
            "encoder_hidden_states": torch.randn(b, 5, 8),
            "original_size": torch.full((b, 2), 4.0),
            "target_size": torch.full((b, 2), 4.0),
            "crop_coords": torch.zeros(b, 2),
        },
    ),
    # flows, noise at the high end
    "SD3Transformer2DModel": (
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_projection_dim": 16,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 10,
        },
        lambda b: {
            "hidden_states": torch.randn(b, 4, 8, 8),
            "encoder_hidden_states": torch.randn(b, 5, 12),
            "pooled_projections": torch.randn(b, 10),
        },
    ),
    "SanaTransformer2DModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 8,
            "caption_channels": 8,
            "sample_size": 4,
        },
        lambda b: {"hidden_states": torch.randn(b, 4, 4, 4), "encoder_hidden_states": torch.randn(b, 5, 8)},
    ),
    "HiDreamImageTransformer2DModel": (
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": [8, 6],
            "text_emb_dim": 10,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (8, 8),
            "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        lambda b: {
            "hidden_states": torch.randn(b, 4, 8, 8),
            "encoder_hidden_states_t5": torch.randn(b, 5, 8),
            "encoder_hidden_states_llama3": torch.randn(2, b, 5, 6),
            "pooled_embeds": torch.randn(b, 10),
        },
    ),
    "FluxTransformer2DModel": (
        {**_FLUX, "pooled_projection_dim": 10, "axes_dims_rope": (4, 4, 8)},
        lambda b: {**_flux_inputs(b), "pooled_projections": torch.randn(b, 10)},
    ),
    "ChromaTransformer2DModel": (
        {
            **_FLUX,
            "axes_dims_rope": (4, 4, 8),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        _flux_inputs,
    ),
    "Flux2Transformer2DModel": (
        {**_FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 8},
        lambda b: {
            **_flux_inputs(b),
            "img_ids": torch.arange(32.0).view(1, 8, 4).expand(b, -1, -1),
            "txt_ids": torch.zeros(b, 5, 4),
            "guidance": torch.full((b,), 3.0),
        },
    ),
    "QwenImageTransformer2DModel": (
        {
            "in_channels": 4,
            "out_channels": 1,
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 4, 8),
        },
        lambda b: {
            "hidden_states": torch.randn(b, 8, 4),
            "encoder_hidden_states": torch.randn(b, 5, 12),
            "encoder_hidden_states_mask": torch.ones(b, 5, dtype=torch.bool),
            "img_shapes": [[(1, 2, 4)]] * b,
        },
    ),
    "Krea2Transformer2DModel": (
        {
            "in_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 16,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 8,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 8,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 4, 8),
        },
        lambda b: {
            "hidden_states": torch.randn(b, 8, 4),
            "encoder_hidden_states": torch.randn(b, 5, 2, 8),
            "position_ids": torch.arange(39).view(13, 3),
        },
    ),
    "AuraFlowTransformer2DModel": (
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_projection_dim": 16,
            "joint_attention_dim": 12,
            "pos_embed_max_size": 16,
        },
        lambda b: {"hidden_states": torch.randn(b, 4, 8, 8), "encoder_hidden_states": torch.randn(b, 5, 12)},
    ),
    # flows, data at the high end
    "LuminaNextDiT2DModel": (
        {
            "sample_size": 4,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "cross_attention_dim": 8,
        },
        lambda b: {
            "hidden_states": torch.randn(b, 4, 4, 4),
            "encoder_hidden_states": torch.randn(b, 5, 8),
            "encoder_mask": torch.ones(b, 5),
            "image_rotary_emb": get_2d_rotary_pos_embed_lumina(8, 4, 4),
            "cross_attention_kwargs": {},
        },
    ),
    "Lumina2Transformer2DModel": (
        {
            "sample_size": 4,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (16, 16, 16),
            "cap_feat_dim": 8,
        },
        lambda b: {
            "hidden_states": torch.randn(b, 4, 4, 4),
            "encoder_hidden_states": torch.randn(b, 5, 8),
            "encoder_attention_mask": torch.ones(b, 5, dtype=torch.bool),
        },
    ),
    "ZImageTransformer2DModel": (
        {
            "in_channels": 4,
            "dim": 16,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 8,
            "axes_dims": [4, 2, 2],
            "axes_lens": [128, 16, 16],
        },
        lambda b: {
            "x": [torch.randn(4, 1, 4, 4) for _ in range(b)],
            "cap_feats": [torch.randn(5, 8) for _ in range(b)],
        },
    ),
}
