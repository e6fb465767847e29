"""The transformers of videos among the denoisers: arguments of a tiny one, and its inputs for a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.helpers.denoisers.wan import WAN

VIDEOS: dict[str, tuple[dict[str, Any], Callable[[int], dict[str, Any]]]] = {
    # discrete schedules
    "CogVideoXTransformer3DModel": (
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
    ),
    # flows, noise at the high end
    "HunyuanVideoTransformer3DModel": (
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
    ),
    "WanTransformer3DModel": (
        WAN,
        lambda b: {"hidden_states": torch.randn(b, 4, 2, 4, 4), "encoder_hidden_states": torch.randn(b, 5, 8)},
    ),
    "LTXVideoTransformer3DModel": (
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
    ),
    "CosmosTransformer3DModel": (
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
    ),
    # flows, data at the high end
    "MochiTransformer3DModel": (
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
    ),
}
