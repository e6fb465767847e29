"""Denoisers of sound, and of video with sound: arguments of a tiny one, and its inputs for a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.helpers.denoisers.others import KANDINSKY

_LTX = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "num_layers": 1,
    "caption_channels": 8,
    "rope_double_precision": False,
}

SOUNDS: dict[str, tuple[dict[str, Any], Callable[[int], dict[str, Any]]]] = {
    "LTX2VideoTransformer3DModel": (
        _LTX,
        lambda b: {
            "hidden_states": torch.randn(b, 2 * 2 * 2, 4),
            "audio_hidden_states": torch.randn(b, 3, 4),
            "encoder_hidden_states": torch.randn(b, 5, 8),
            "audio_encoder_hidden_states": torch.randn(b, 5, 8),
            "num_frames": 2,
            "height": 2,
            "width": 2,
            "audio_num_frames": 3,
        },
    ),
    "SanaWMLTX2RefinerTransformer3DModel": (
        _LTX,
        lambda b: {
            "hidden_states": torch.randn(b, 8, 4),
            "encoder_hidden_states": torch.randn(b, 5, 8),
            "video_rotary_emb": (torch.ones(b, 8, 16), torch.zeros(b, 8, 16)),
        },
    ),
    "Kandinsky6Transformer3DModel": (
        {
            **KANDINSKY,
            "visual_cond": False,
            "in_audio_dim": 3,
            "out_audio_dim": 3,
        },
        lambda b: {
            "hidden_states": torch.randn(b, 2, 4, 4, 4),
            "encoder_hidden_states": torch.randn(b, 5, 8),
            "pooled_projections": torch.randn(b, 6),
            "audio_hidden_states": torch.randn(b, 3, 3),
        },
    ),
    "MiniMaxH3Transformer3DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "hidden_size": 24,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "ffn_dim": 12,
            "in_channels": 2,
            "audio_in_channels": 3,
            "text_dim": 6,
            "freq_dim": 8,
            "time_embed_hidden_dim": 10,
            "time_embed_dim": 12,
            "rope_freq_dim": 2,
        },
        lambda b: {
            "hidden_states": torch.randn(b, 4, 8),
            "audio_hidden_states": torch.randn(b, 3, 3),
            "encoder_hidden_states": torch.randn(b, 5, 6),
            "timestep_indices": torch.tensor([0] * 4 + [0] * 3 + [0] * 5),
            "token_tags": torch.tensor([0] * 4 + [2] * 3 + [1] * 5),
            "position_ids": torch.arange(36).view(12, 3),
            "video_indices": torch.arange(4),
            "audio_indices": torch.arange(4, 7),
            "text_indices": torch.arange(7, 12),
        },
    ),
    "MiniMaxMusic3Transformer1DModel": (
        {
            "in_channels": 4,
            "condition_dim": 6,
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "ff_inner_dim": 12,
            "rotary_dim": 4,
            "fourier_embedding_dim": 8,
        },
        lambda b: {"hidden_states": torch.randn(b, 4, 7), "encoder_hidden_states": torch.randn(b, 7, 6)},
    ),
    "AceStepTransformer1DModel": (
        {
            "hidden_size": 16,
            "intermediate_size": 12,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "in_channels": 10,
            "audio_acoustic_hidden_dim": 4,
            "encoder_hidden_size": 8,
        },
        lambda b: {
            "hidden_states": torch.randn(b, 6, 4),
            "timestep_r": torch.full((b,), 0.1),
            "encoder_hidden_states": torch.randn(b, 5, 8),
            "context_latents": torch.randn(b, 6, 6),
        },
    ),
    "LongCatAudioDiTTransformer": (
        {"dit_dim": 16, "dit_depth": 1, "dit_heads": 2, "dit_text_dim": 6, "latent_dim": 4, "ff_mult": 2.0},
        lambda b: {
            "hidden_states": torch.randn(b, 6, 4),
            "encoder_hidden_states": torch.randn(b, 5, 6),
            "encoder_attention_mask": torch.ones(b, 5, dtype=torch.bool),
            "latent_cond": torch.randn(b, 6, 4),
        },
    ),
    "StableAudio3DiTModel": (
        {
            "io_channels": 4,
            "embed_dim": 16,
            "depth": 1,
            "num_heads": 2,
            "cond_token_dim": 6,
            "global_cond_dim": 5,
            "local_add_cond_dim": 3,
            "timestep_features_dim": 8,
            "ff_mult": 2.0,
            "num_memory_tokens": 2,
        },
        lambda b: {
            "hidden_states": torch.randn(b, 4, 6),
            "encoder_hidden_states": torch.randn(b, 5, 6),
            "global_hidden_states": torch.randn(b, 5),
        },
    ),
    "StableAudioDiTModel": (
        {
            "sample_size": 6,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 1,
            "cross_attention_dim": 10,
            "time_proj_dim": 8,
            "global_states_input_dim": 5,
            "cross_attention_input_dim": 6,
        },
        lambda b: {
            "hidden_states": torch.randn(b, 4, 6),
            "encoder_hidden_states": torch.randn(b, 5, 6),
            "global_hidden_states": torch.randn(b, 1, 5),
            "rotary_embedding": (torch.ones(7, 4), torch.zeros(7, 4)),
        },
    ),
}

SOUND_SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "SanaWMLTX2RefinerTransformer3DModel": lambda t: t[:, None].expand(-1, 8),
}
