"""gemma-tiny's architecture: DiffusionGemma's own class, 0.99 M parameters, a canvas of 16 positions."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextConfig,
    Gemma4VisionConfig,
    PreTrainedTokenizerFast,
)

CANVAS = 16  # positions


def build_gemma(tokenizer: PreTrainedTokenizerFast) -> DiffusionGemmaForBlockDiffusion:
    """4 layers of width 128: 4 heads, 2 of keys, an MLP of 192 and 4 experts of 64, 2 of which see a token.

    The last layer has full attention, the others a window of 32 tokens. The vision tower is as small as its class
    allows, and never trained.
    """
    text = DiffusionGemmaTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        num_global_key_value_heads=2,
        head_dim=32,
        global_head_dim=32,
        sliding_window=32,
        max_position_embeddings=256,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
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
    config = DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        canvas_length=CANVAS,
    )
    model = DiffusionGemmaForBlockDiffusion(config)
    model.model.encoder.vision_tower.requires_grad_(False)
    model.model.encoder.embed_vision.requires_grad_(False)
    return model


def save_gemma(model: DiffusionGemmaForBlockDiffusion, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write model and tokenizer as transformers does."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory, save_jinja_files=False)
