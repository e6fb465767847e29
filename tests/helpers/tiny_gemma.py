"""A random DiffusionGemma of a few thousand parameters, for tests."""

from __future__ import annotations

import copy

import torch
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextConfig,
    Gemma4VisionConfig,
)

VOCABULARY, CANVAS, WINDOW = 61, 6, 5
_BUILT: dict[str, tuple[DiffusionGemmaForBlockDiffusion, torch.Tensor]] = {}
"""{arguments: the model, and the state of the generator after it was built}."""


def tiny_gemma(seed: int = 0, **text: object) -> DiffusionGemmaForBlockDiffusion:
    """A copy of the model that `build_gemma` builds once for these arguments: copying takes a seventh of the time."""
    key = repr((seed, sorted(text.items())))
    if key not in _BUILT:
        _BUILT[key] = build_gemma(seed, **text), torch.get_rng_state()
    model, random_state = _BUILT[key]
    torch.set_rng_state(random_state)
    return copy.deepcopy(model)


def build_gemma(seed: int, **text: object) -> DiffusionGemmaForBlockDiffusion:
    """Two layers of width 20: one with a window of 5 tokens, one with full attention; a canvas of 6 positions."""
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 20,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_global_key_value_heads": 1,
        "head_dim": 8,
        "global_head_dim": 12,
        "sliding_window": WINDOW,
        "max_position_embeddings": 128,
        "num_experts": 3,
        "top_k_experts": 2,
        "moe_intermediate_size": 12,
        "initializer_range": 0.3,  # so that tokens matter
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    vision = Gemma4VisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        patch_size=2,
        position_embedding_size=4,
        pooling_kernel_size=1,
    )
    torch.manual_seed(seed)
    config = DiffusionGemmaConfig(
        text_config=DiffusionGemmaTextConfig(**{**fields, **text}),
        vision_config=vision,
        canvas_length=CANVAS,
        initializer_range=0.3,
    )
    return DiffusionGemmaForBlockDiffusion(config).eval()
