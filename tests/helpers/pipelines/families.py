"""Tiny random pipelines of the families that train_scripts/dreambooth.py trains and `small_pipelines` lacks.

Their tokenizers know bytes; images have 8 × 8 or 2 × 2 pixels a latent. No parameter is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    WanPipeline,
    ZImagePipeline,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.helpers.denoisers import denoiser, random_model
from tests.helpers.small_pipelines import (
    letters_of_t5,
    quiet,
    small_flux,
    small_sd,
    small_sd3,
    small_sdxl,
    small_vae,
)

_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Bytes, with Qwen's words of a chat."""
    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], chat_template=_CHAT)


def small_z_image() -> ZImagePipeline:
    """Three axes of positions, one layer of each kind."""
    tokenizer = qwen_tokenizer()
    config = Qwen3Config(vocab_size=len(tokenizer), head_dim=4, **_TEXT)
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=small_vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=random_model(Qwen3Model, 7, config),
        tokenizer=tokenizer,
        transformer=denoiser("ZImageTransformer2DModel", scale=0.1, axes_lens=[256, 16, 16]),
    )
    return quiet(pipe)


def small_qwen_image() -> QwenImagePipeline:
    """Qwen2.5-VL with a tower for images that nothing reads."""
    tokenizer = qwen_tokenizer()
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 8}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1]}
    config = Qwen2_5_VLConfig(
        text_config={"vocab_size": len(tokenizer), "rope_parameters": rope, **_TEXT}, vision_config=vision
    )
    transformer = random_model(
        QwenImageTransformer2DModel,
        3,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_video_vae(AutoencoderKLQwenImage),
        text_encoder=random_model(Qwen2_5_VLForConditionalGeneration, 7, config),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    return quiet(pipe)


def _video_vae(kind: Any) -> Any:
    return random_model(
        kind,
        7,
        scale=0.05,
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 2.0, 1.5, 1.0],
    )


def small_wan_images(**options: Any) -> WanPipeline:
    """Wan 2.1, with UMT5."""
    tokenizer = letters_of_t5()
    config = UMT5Config(vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=random_model(UMT5EncoderModel, 7, config),
        vae=_video_vae(AutoencoderKLWan),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=denoiser("WanTransformer3DModel", scale=0.1, rope_max_seq_len=32),
        **options,
    )
    return quiet(pipe)


def small_wan_experts(boundary_ratio: float = 0.6) -> WanPipeline:
    """Wan 2.2 14B, with two transformers that differ."""
    low = denoiser("WanTransformer3DModel", scale=0.12, rope_max_seq_len=32)
    return small_wan_images(transformer_2=low, boundary_ratio=boundary_ratio)


def small_flux2_klein() -> Flux2KleinPipeline:
    """Its text encoder has 28 layers, of which the pipeline reads the 9th, 18th and 27th."""
    tokenizer = qwen_tokenizer()
    config = Qwen3Config(vocab_size=len(tokenizer), head_dim=4, **{**_TEXT, "num_hidden_layers": 28})
    vae = random_model(
        AutoencoderKLFlux2,
        7,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        scale=0.05,
    )
    vae.bn.running_mean.copy_(torch.linspace(-1, 1, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2, 16))
    pipe = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=random_model(Qwen3ForCausalLM, 7, config),
        tokenizer=tokenizer,
        transformer=random_model(Flux2Transformer2DModel, 3, **flux2_options(guidance_embeds=False)),
    )
    return quiet(pipe)


def small_flux2_dev() -> Flux2Pipeline:
    """With distilled guidance. A model of text alone stands for Mistral's, of which the layers 10, 20 and 30 count."""
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
    )
    sizes = {**_TEXT, "num_hidden_layers": 31, "max_position_embeddings": 1024}
    klein = small_flux2_klein()
    pipe = Flux2Pipeline(
        scheduler=klein.scheduler,
        vae=klein.vae,
        text_encoder=random_model(Qwen3ForCausalLM, 7, Qwen3Config(vocab_size=len(tokenizer), head_dim=4, **sizes)),
        tokenizer=tokenizer,
        transformer=random_model(Flux2Transformer2DModel, 3, **flux2_options()),
    )
    return quiet(pipe)


def flux2_options(**changes: Any) -> dict[str, Any]:
    """Of a transformer that reads three layers of width 8."""
    options = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "axes_dims_rope": (4, 4, 4, 4),
        "timestep_guidance_channels": 8,
    }
    return {**options, **changes}


FAMILY_PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": small_sd,
    "sdxl": small_sdxl,
    "sd3": small_sd3,
    "flux": small_flux,
    "flux2": small_flux2_klein,
    "z_image": small_z_image,
    "qwen_image": small_qwen_image,
    "wan": small_wan_images,
}
"""A tiny pipeline of each family, by the family's name."""
