"""Tiny random pipelines of the families that edit images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import (
    FluxKontextPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from tests.helpers.denoisers import random_model
from tests.helpers.pipelines.families import qwen_tokenizer, small_flux2_dev, small_flux2_klein, small_qwen_image
from tests.helpers.small_pipelines import quiet, small_flux

_IMAGE_WORDS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def small_kontext() -> FluxKontextPipeline:
    """Of `small_flux`'s parts."""
    parts = {name: part for name, part in small_flux().components.items() if part is not None}
    return quiet(FluxKontextPipeline(**parts))


def _small_qwen(kind: Any, **options: Any) -> Any:
    """Qwen2.5-VL with a tower for images of 14 × 14 pixels a patch; images have 4 to 16 tokens."""
    tokenizer = qwen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": _IMAGE_WORDS})
    ids: dict[str, Any] = {word: tokenizer.convert_tokens_to_ids(word) for word in _IMAGE_WORDS}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 12}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 12,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]},
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
    )
    sizes = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    image_processor = Qwen2VLImageProcessorPil(size=sizes)
    processor = Qwen2VLProcessor(image_processor, tokenizer, Qwen2VLVideoProcessor())
    transformer = random_model(
        QwenImageTransformer2DModel,
        3,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 4, 8),
        **options,
    )
    plain = small_qwen_image()
    pipe = kind(
        scheduler=plain.scheduler,
        vae=plain.vae,
        text_encoder=random_model(Qwen2_5_VLForConditionalGeneration, 7, config),
        tokenizer=tokenizer,
        processor=processor,
        transformer=transformer,
    )
    return quiet(pipe)


def small_qwen_edit() -> QwenImageEditPipeline:
    """Reads one image."""
    return _small_qwen(QwenImageEditPipeline)


def small_qwen_plus() -> QwenImageEditPlusPipeline:
    """Reads several images, and conditions them at t = 0 as 2511 does."""
    return _small_qwen(QwenImageEditPlusPipeline, zero_cond_t=True)


EDIT_PIPELINES: dict[str, Callable[[], Any]] = {
    "kontext": small_kontext,
    "qwen edit": small_qwen_edit,
    "qwen plus": small_qwen_plus,
    "flux2": small_flux2_dev,
    "flux2 klein": small_flux2_klein,
}
"""A tiny pipeline of each family that takes images to edit."""
