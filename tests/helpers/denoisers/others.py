"""Denoisers of no family of their own: arguments of a tiny one, and its inputs for a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "patch_size": 2,
}


def _video(batch: int) -> dict[str, Any]:
    return {"hidden_states": torch.randn(batch, 4, 2, 4, 4), "encoder_hidden_states": torch.randn(batch, 5, 8)}


KANDINSKY = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 8,
    "in_text_dim2": 6,
    "time_dim": 8,
    "model_dim": 32,
    "ff_dim": 20,
    "num_text_blocks": 1,
    "num_visual_blocks": 1,
    "axes_dims": (4, 6, 6),
}

OTHERS: dict[str, tuple[dict[str, Any], Callable[[int], dict[str, Any]]]] = {
    "AllegroTransformer3DModel": (
        {
            **_DIT,
            "cross_attention_dim": 24,
            "sample_height": 4,
            "sample_width": 4,
            "sample_frames": 2,
            "caption_channels": 8,
        },
        lambda b: {
            **_video(b),
            "attention_mask": torch.ones(b, 2, 4, 4),
            "encoder_attention_mask": torch.ones(b, 1, 5),
            "image_rotary_emb": (
                ((torch.ones(8, 4), torch.zeros(8, 4)),) * 3,
                (torch.zeros(1, 8, dtype=torch.long),) * 3,
            ),
        },
    ),
    "CogView3PlusTransformer2DModel": (
        {
            **_DIT,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "pos_embed_max_size": 8,
            "sample_size": 4,
        },
        lambda b: {
            "hidden_states": torch.randn(b, 4, 4, 4),
            "encoder_hidden_states": torch.randn(b, 5, 8),
            "original_size": torch.full((b, 2), 4.0),
            "target_size": torch.full((b, 2), 4.0),
            "crop_coords": torch.zeros(b, 2),
        },
    ),
    "ConsisIDTransformer3DModel": (
        {
            **_DIT,
            "attention_head_dim": 8,
            "time_embed_dim": 4,
            "text_embed_dim": 8,
            "sample_width": 4,
            "sample_height": 4,
            "sample_frames": 5,
            "max_text_seq_length": 5,
            "use_rotary_positional_embeddings": False,
        },
        lambda b: {"hidden_states": torch.randn(b, 2, 4, 4, 4), "encoder_hidden_states": torch.randn(b, 5, 8)},
    ),
    "DiTTransformer2DModel": (
        {**_DIT, "sample_size": 4, "norm_num_groups": 2, "num_embeds_ada_norm": 9},
        lambda b: {"hidden_states": torch.randn(b, 4, 4, 4), "class_labels": torch.arange(b)},
    ),
    "LatteTransformer3DModel": (
        {
            **_DIT,
            "cross_attention_dim": 24,
            "sample_size": 4,
            "caption_channels": 8,
            "norm_type": "ada_norm_single",
            "num_embeds_ada_norm": 9,
            "norm_elementwise_affine": False,
            "video_length": 2,
            "attention_bias": True,
        },
        _video,
    ),
    "PriorTransformer": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "num_layers": 1,
            "embedding_dim": 6,
            "num_embeddings": 5,
            "additional_embeddings": 4,
        },
        lambda b: {
            "hidden_states": torch.randn(b, 6),
            "proj_embedding": torch.randn(b, 6),
            "encoder_hidden_states": torch.randn(b, 5, 6),
        },
    ),
    "Kandinsky5Transformer3DModel": (
        KANDINSKY,
        lambda b: {
            "hidden_states": torch.randn(b, 2, 4, 4, 4),
            "encoder_hidden_states": torch.randn(b, 5, 8),
            "pooled_projections": torch.randn(b, 6),
            "visual_rope_pos": [torch.arange(2), torch.arange(2), torch.arange(2)],
            "text_rope_pos": torch.arange(5),
        },
    ),
    "Kandinsky6SRTransformer3DModel": (
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 8,
            "model_dim": 32,
            "ff_dim": 20,
            "num_visual_blocks": 1,
            "axes_dims": (4, 6, 6),
        },
        lambda b: {"hidden_states": torch.randn(b, 1, 8, 8, 9)},
    ),
    "SanaVideoTransformer3DModel": (
        {
            **_DIT,
            "patch_size": (1, 2, 2),
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 8,
            "sample_size": 4,
            "rope_max_seq_len": 16,
        },
        _video,
    ),
    "SanaWMTransformer3DModel": (
        {
            "in_channels": 4,
            "num_layers": 2,
            "hidden_size": 24,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 12,
            "chunk_plucker_channels": 3,
            "chunk_plucker_post_attn_blocks": 1,
            "image_size": 4,
            "caption_channels": 8,
            "mlp_ratio": 2.0,
        },
        lambda b: {
            "hidden_states": torch.randn(b, 4, 2, 4, 4),
            "encoder_hidden_states": torch.randn(b, 1, 5, 8),
            "mask": torch.ones(b, 5),
        },
    ),
    "Cosmos3OmniTransformer": (
        {
            "dtype": "float32",
            "head_dim": 12,
            "hidden_size": 24,
            "intermediate_size": 16,
            "latent_channel": 4,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "num_key_value_heads": 1,
            "patch_latent_dim": 16,
            "rope_scaling": {"mrope_section": [2, 2, 2]},
            "vocab_size": 9,
            "sound_dim": 3,
            "sound_gen": True,
        },
        lambda b: {
            "input_ids": torch.arange(1, 4),
            "text_indexes": torch.arange(3),
            "position_ids": torch.arange(27).view(3, 9),
            "und_len": 3,
            "sequence_length": 9,
            "vision_tokens": [torch.randn(1, 4, 2, 4, 2)],
            "vision_token_shapes": [(2, 2, 1)],
            "vision_sequence_indexes": torch.arange(3, 7),
            "vision_mse_loss_indexes": torch.arange(5, 7),
            "vision_noisy_frame_indexes": [torch.tensor([1])],
            "sound_tokens": [torch.randn(3, 2)],
            "sound_token_shapes": [(2, 1, 1)],
            "sound_sequence_indexes": torch.arange(7, 9),
            "sound_mse_loss_indexes": torch.arange(7, 9),
            "sound_timesteps": torch.zeros(2),
            "sound_noisy_frame_indexes": [torch.arange(2)],
        },
    ),
    "RFD4ProteinaTransformer": (
        {
            "nlayers": 1,
            "token_dim": 16,
            "nheads": 2,
            "dim_cond": 8,
            "pair_repr_dim": 8,
            "latent_dim": 4,
            "t_emb_dim": 6,
            "xt_pair_dist_dim": 5,
            "tri_mult_c": 4,
            "update_pair_repr_every_n": 1,
            "feats_seq": ("xt_bb_ca", "xt_local_latents"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
        },
        lambda b: {
            "bb_ca": torch.randn(b, 5, 3),
            "local_latents": torch.randn(b, 5, 4),
            "local_latents_time": torch.ones(b),
            "padding_mask": torch.ones(b, 5, dtype=torch.bool),
            "conditioning": {
                "is_in_context_conditioning": torch.zeros(b, 5),
                "supports_local_latent": torch.ones(b, 5),
            },
        },
    ),
}

OTHER_SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Cosmos3OmniTransformer": lambda t: t[:1].expand(2),
    "SanaWMTransformer3DModel": lambda t: t[:, None, None].expand(-1, 1, 2),
}
