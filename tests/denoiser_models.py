"""Tiny random denoisers of the true Diffusers classes, each with inputs for a batch, its timestep left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch import Tensor, nn

Inputs = dict[str, Any]
DENOISERS: dict[str, tuple[dict[str, Any], Callable[[int], Inputs]]] = {}
"""Class name → (the arguments of its constructor, its inputs for a batch of that size)."""


def denoiser(name: str, **changes: Any) -> nn.Module:
    """A random model of the Diffusers class `name`, in evaluation mode; no parameter is zero."""
    if name.startswith("Cosmos"):
        pytest.importorskip("torchvision", reason="Diffusers' Cosmos resizes its padding mask with torchvision")
    torch.manual_seed(3)
    options, _ = DENOISERS[name]
    model = getattr(diffusers, name)(**{**options, **changes}).eval()
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():  # Diffusers starts gates and last layers at zero, which hides adapters
        scale = 0.3 if parameter.dim() > 1 else 0.1
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model


def inputs_of(name: str, batch: int = 2) -> Inputs:
    """What `denoiser(name)` takes beside its timestep."""
    torch.manual_seed(5)
    return DENOISERS[name][1](batch)


_SHARED = ("position_ids", "padding_mask", "image_rotary_emb", "added_cond_kwargs", "cross_attention_kwargs")


def sample_of(inputs: Inputs, index: int, batch: int) -> Inputs:
    """The inputs of one sample of a batch; an input may have several rows a sample."""

    def part(key: str, value: Any) -> Any:
        if key == "encoder_hidden_states_llama3":  # (layers, b, l, d)
            return value[:, index : index + 1]
        if key in _SHARED or not hasattr(value, "__len__") or (key.endswith("_ids") and value.dim() == 2):
            return value
        rows = len(value) // batch
        return value[index * rows : (index + 1) * rows]

    return {key: part(key, value) for key, value in inputs.items()}


def tensor_of(output: Any) -> Tensor:
    """The prediction in what a denoiser returns: most give an object, some a list with one tensor a sample."""
    sample = output[0]
    return torch.stack(sample) if isinstance(sample, list) else sample


def _define(name: str, options: dict[str, Any], inputs: Callable[[int], Inputs]) -> None:
    DENOISERS[name] = (options, inputs)


# ------------------------------------------------------------------ UNets

_UNET = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "cross_attention_dim": 6,
}


def _blocks(suffix: str) -> dict[str, Any]:
    return {
        "down_block_types": (f"CrossAttnDownBlock{suffix}", f"DownBlock{suffix}"),
        "up_block_types": (f"UpBlock{suffix}", f"CrossAttnUpBlock{suffix}"),
    }


_define(
    "UNet2DConditionModel",
    {**_UNET, **_blocks("2D"), "attention_head_dim": 2},
    lambda b: {"sample": torch.randn(b, 3, 8, 8), "encoder_hidden_states": torch.randn(b, 5, 6)},
)
_define(
    "UNet3DConditionModel",
    {**_UNET, **_blocks("3D"), "attention_head_dim": 2},
    lambda b: {"sample": torch.randn(b, 3, 4, 8, 8), "encoder_hidden_states": torch.randn(b, 5, 6)},
)
_define(
    "UNetMotionModel",
    {**_UNET, **_blocks("Motion"), "num_attention_heads": 2, "motion_num_attention_heads": 2},
    lambda b: {  # the text is repeated for each frame, as the pipeline does
        "sample": torch.randn(b, 3, 4, 8, 8),
        "encoder_hidden_states": torch.randn(b, 5, 6).repeat_interleave(4, dim=0),
    },
)

# ------------------------------------------------------------------ transformers on discrete schedules

_define(
    "PixArtTransformer2DModel",
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
)
_define(
    "HunyuanDiT2DModel",
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
)
_define(
    "CogVideoXTransformer3DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 4,
        "text_embed_dim": 8,
        "num_layers": 1,
        "sample_width": 4,
        "sample_height": 4,
        "sample_frames": 5,
        "max_text_seq_length": 5,
    },
    lambda b: {"hidden_states": torch.randn(b, 2, 4, 4, 4), "encoder_hidden_states": torch.randn(b, 5, 8)},
)
_define(
    "CogView4Transformer2DModel",
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
)

# ------------------------------------------------------------------ flow transformers, noise at the high end

_define(
    "SD3Transformer2DModel",
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
)
_define(
    "SanaTransformer2DModel",
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
)
_define(
    "HunyuanVideoTransformer3DModel",
    {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 10,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": 8,
        "pooled_projection_dim": 6,
        "rope_axes_dim": (2, 4, 4),
    },
    lambda b: {
        "hidden_states": torch.randn(b, 4, 2, 4, 4),
        "encoder_hidden_states": torch.randn(b, 5, 8),
        "encoder_attention_mask": torch.ones(b, 5),
        "pooled_projections": torch.randn(b, 6),
        "guidance": torch.full((b,), 3.0),
    },
)
_define(
    "WanTransformer3DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 8,
        "freq_dim": 8,
        "ffn_dim": 16,
        "num_layers": 1,
        "rope_max_seq_len": 16,
    },
    lambda b: {"hidden_states": torch.randn(b, 4, 2, 4, 4), "encoder_hidden_states": torch.randn(b, 5, 8)},
)
_define(
    "LTXVideoTransformer3DModel",
    {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "num_layers": 1,
        "caption_channels": 8,
    },
    lambda b: {
        "hidden_states": torch.randn(b, 2 * 2 * 2, 4),
        "encoder_hidden_states": torch.randn(b, 5, 8),
        "encoder_attention_mask": torch.ones(b, 5),
        "num_frames": 2,
        "height": 2,
        "width": 2,
    },
)
_define(
    "HiDreamImageTransformer2DModel",
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
)

_FLUX = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
}


def _flux_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 8, 4),
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "img_ids": torch.arange(24.0).view(8, 3),
        "txt_ids": torch.zeros(5, 3),
    }


_define(
    "FluxTransformer2DModel",
    {**_FLUX, "pooled_projection_dim": 10, "axes_dims_rope": (4, 4, 8)},
    lambda b: {**_flux_inputs(b), "pooled_projections": torch.randn(b, 10)},
)
_define(
    "ChromaTransformer2DModel",
    {
        **_FLUX,
        "axes_dims_rope": (4, 4, 8),
        "approximator_num_channels": 8,
        "approximator_hidden_dim": 16,
        "approximator_layers": 1,
    },
    _flux_inputs,
)
_define(
    "Flux2Transformer2DModel",
    {**_FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 8},
    lambda b: {
        **_flux_inputs(b),
        "img_ids": torch.arange(32.0).view(1, 8, 4).expand(b, -1, -1),
        "txt_ids": torch.zeros(b, 5, 4),
        "guidance": torch.full((b,), 3.0),
    },
)
_define(
    "QwenImageTransformer2DModel",
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
)
_define(
    "Krea2Transformer2DModel",
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
)
_define(
    "AuraFlowTransformer2DModel",
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
)
_define(
    "CosmosTransformer3DModel",
    {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 1,
        "mlp_ratio": 2,
        "text_embed_dim": 8,
        "adaln_lora_dim": 4,
        "max_size": (2, 4, 4),
        "extra_pos_embed_type": None,
    },
    lambda b: {
        "hidden_states": torch.randn(b, 4, 2, 4, 4),
        "encoder_hidden_states": torch.randn(b, 5, 8),
        "padding_mask": torch.zeros(1, 1, 4, 4),
    },
)

# ------------------------------------------------------------------ flow transformers, data at the high end

_define(
    "LuminaNextDiT2DModel",
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
)
_define(
    "Lumina2Transformer2DModel",
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
)
_define(
    "ZImageTransformer2DModel",
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
    lambda b: {"x": [torch.randn(4, 1, 4, 4) for _ in range(b)], "cap_feats": [torch.randn(5, 8) for _ in range(b)]},
)
_define(
    "MochiTransformer3DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,  # the last one does not update the text
        "pooled_projection_dim": 16,
        "in_channels": 4,
        "text_embed_dim": 8,
        "time_embed_dim": 4,
        "max_sequence_length": 5,
    },
    lambda b: {
        "hidden_states": torch.randn(b, 4, 2, 4, 4),
        "encoder_hidden_states": torch.randn(b, 5, 8),
        "encoder_attention_mask": torch.ones(b, 5, dtype=torch.bool),
    },
)
