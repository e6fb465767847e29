"""Wan's descendants among the denoisers: arguments of a tiny one, and its inputs for a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 8,
    "ffn_dim": 16,
    "num_layers": 1,
}
WAN = {**_WAN, "rope_max_seq_len": 16}


def _inputs(batch: int) -> dict[str, Any]:
    return {"hidden_states": torch.randn(batch, 4, 2, 4, 4), "encoder_hidden_states": torch.randn(batch, 5, 8)}


def _frames_first(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 2, 4, 4, 4),
        "encoder_hidden_states": torch.randn(batch, 5, 8),
        "r_timestep": torch.full((batch, 2), 10.0),
    }


class Reference(WanAnimate2KVCache):
    """Keys and values (b, 8, heads, d) of what is given, which have no λ."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        super().__init__(1)
        self.get(0).store(key, value)

    def __len__(self) -> int:
        return len(self.get(0).key)

    def __getitem__(self, rows: slice) -> Reference:
        return Reference(*(part[rows] for part in self.get(0).get()))


WANS: dict[str, tuple[dict[str, Any], Callable[[int], dict[str, Any]]]] = {
    "ChronoEditTransformer3DModel": (WAN, _inputs),
    "SkyReelsV2Transformer3DModel": (WAN, _inputs),
    "WanVACETransformer3DModel": (
        {**WAN, "vace_layers": [0], "vace_in_channels": 6},
        lambda b: {**_inputs(b), "control_hidden_states": torch.randn(b, 6, 2, 4, 4)},
    ),
    "WanAnimateTransformer3DModel": (
        {
            **WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 6,
            "added_kv_proj_dim": 24,
            "motion_encoder_channel_sizes": {"4": 4, "8": 4, "16": 4},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 3,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 1,
        },
        lambda b: {
            "hidden_states": torch.randn(b, 12, 3, 4, 4),
            "encoder_hidden_states": torch.randn(b, 5, 8),
            "encoder_hidden_states_image": torch.randn(b, 3, 6),
            "pose_hidden_states": torch.randn(b, 4, 2, 4, 4),
            "face_pixel_values": torch.randn(b, 3, 5, 16, 16),
        },
    ),
    "AnyFlowTransformer3DModel": (WAN, _frames_first),
    "AnyFlowFARTransformer3DModel": (
        {**WAN, "chunk_partition": (1, 1)},
        lambda b: {**_frames_first(b), "chunk_partition": [1, 1]},
    ),
    "WanAnimate2Transformer3DModel": (
        {
            "text_len": 5,
            "in_dim": 6,
            "dim": 24,
            "ffn_dim": 16,
            "freq_dim": 8,
            "text_dim": 8,
            "out_dim": 4,
            "num_heads": 2,
            "num_layers": 1,
            "use_img_emb": False,
        },
        lambda b: {
            "hidden_states": [torch.randn(4, 2, 4, 4) for _ in range(b)],
            "encoder_hidden_states": [torch.randn(5, 8) for _ in range(b)],
            "condition_latents": [torch.randn(2, 2, 4, 4) for _ in range(b)],
            "kv_cache": Reference(torch.randn(b, 8, 2, 12), torch.randn(b, 8, 2, 12)),
            "kv_cache_mode": "cached",
            "seq_len": 8,
            "reference_grid_sizes": torch.tensor([[2, 2, 2]] * b),
            "origin_len": 5,
            "origin_area": [32, 32],
        },
    ),
    "HeliosTransformer3DModel": ({**_WAN, "rope_dim": (4, 4, 4)}, _inputs),
}

WAN_SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "AnyFlowTransformer3DModel": lambda t: t[:, None].expand(-1, 2),
    "AnyFlowFARTransformer3DModel": lambda t: t[:, None].expand(-1, 2),
}
"""Timesteps (b,) → what a class takes, where it takes no (b,): one value a frame."""
