"""Tiny random Diffusers pipelines of the true classes, for the tests of everything that serves a whole pipeline.

Nothing is downloaded: the tokenizers know bytes and a few whole words. Images are 16 × 16 pixels, latents 8 × 8. No
parameter is zero, so that no adapter hides behind a layer that starts at zero. Every call gives the same weights.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PNDMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.helpers.denoisers import denoiser, random_model

TEXT_WIDTHS = (16, 24)
"""Widths of SDXL's two text encoders; the UNet's cross-attention sees their sum."""

MAX_TOKENS = 12
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MORE_ATTENTION: dict[str, Any] = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
"""Changes of a `small_unet`: attention in the first of two levels up, too."""
_WORDS = ("a", "photo", "of", "toy", "red", "cube", "on", "grass")


def clip_tokenizer() -> CLIPTokenizer:
    """Letters, digits and a few whole words; any other text falls apart into letters."""
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    pieces = characters + [f"{character}</w>" for character in characters]
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        merged = word[0]
        for index, character in enumerate(word[1:], start=1):
            right = f"{character}</w>" if index == len(word) - 1 else character
            if (merged, right) not in merges:
                merges.append((merged, right))
                pieces.append(merged + right)
            merged += right
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def letters_of_t5(length: int = 512) -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    letters = [(chr(code), -3.0) for code in range(ord("a"), ord("z") + 1)]
    return T5Tokenizer(vocab=pieces + letters, extra_ids=0, model_max_length=length)


def text_encoder(
    tokens: int, width: int, *, projection: bool = False, seed: int = 4, length: int = MAX_TOKENS
) -> nn.Module:
    """A CLIP text encoder of two layers; with `projection`, the class whose pooled output SDXL and SD3 read."""
    config = CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
        pad_token_id=tokens - 1,
    )
    return random_model(CLIPTextModelWithProjection if projection else CLIPTextModel, seed, config)


def small_vae(latent_channels: int = 4, **changes: Any) -> AutoencoderKL:
    """16 × 16 pixels ↔ 8 × 8 latents."""
    options = {
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": latent_channels,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    return random_model(AutoencoderKL, 2, **{**options, **changes})


def small_unet(cross_attention_dim: int, *, pooled: int | None = None, **changes: Any) -> UNet2DConditionModel:
    """Attention in the second of two levels and in the middle; no more, since adapters are added module by module.

    With `pooled`, the width of the pooled text, it is conditioned as SDXL's.
    """
    options = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": (2, 4),
        "cross_attention_dim": cross_attention_dim,
        "use_linear_projection": True,
    }
    if pooled is not None:
        options |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
        options["projection_class_embeddings_input_dim"] = 6 * 4 + pooled
    return random_model(UNet2DConditionModel, 3, **{**options, **changes})


def clips(*, projection: bool) -> dict[str, Any]:
    """The two text encoders of SDXL, or with `projection` of SD3, with their tokenizers."""
    tokens = len(clip_tokenizer())
    return {
        "text_encoder": text_encoder(tokens, TEXT_WIDTHS[0], projection=projection),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": text_encoder(tokens, TEXT_WIDTHS[1], projection=True, seed=5),
        "tokenizer_2": clip_tokenizer(),
    }


def small_sdxl(**unet_changes: Any) -> StableDiffusionXLPipeline:
    """A pipeline of the true SDXL classes: text_time conditioning, two text encoders, AutoencoderKL."""
    pipe = StableDiffusionXLPipeline(
        vae=small_vae(force_upcast=False),
        unet=small_unet(sum(TEXT_WIDTHS), pooled=TEXT_WIDTHS[1], **unet_changes),
        scheduler=EulerDiscreteScheduler(**BETAS),
        add_watermarker=False,
        **clips(projection=False),
    )
    return quiet(pipe)


def small_sd(**unet_changes: Any) -> StableDiffusionPipeline:
    """A pipeline of the true Stable Diffusion 1 classes, without a safety checker."""
    tokenizer = clip_tokenizer()
    pipe = StableDiffusionPipeline(
        vae=small_vae(),
        text_encoder=text_encoder(len(tokenizer), TEXT_WIDTHS[0]),
        tokenizer=tokenizer,
        unet=small_unet(TEXT_WIDTHS[0], **unet_changes),
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return quiet(pipe)


def small_sd3() -> StableDiffusion3Pipeline:
    """A pipeline of the true Stable Diffusion 3 classes, without the T5 encoder, which it can do without."""
    widths = {"joint_attention_dim": sum(TEXT_WIDTHS), "pooled_projection_dim": sum(TEXT_WIDTHS)}
    pipe = StableDiffusion3Pipeline(
        transformer=denoiser("SD3Transformer2DModel", scale=0.1, num_layers=2, **widths),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=small_vae(shift_factor=0.0),
        text_encoder_3=None,
        tokenizer_3=None,
        **clips(projection=True),
    )
    return quiet(pipe)


def flux_transformer(**options: Any) -> Any:
    sizes = {"in_channels": 16, "out_channels": None, "joint_attention_dim": 12, "guidance_embeds": True}
    return denoiser("FluxTransformer2DModel", scale=0.1, **sizes, **options)


def small_flux() -> FluxPipeline:
    """A pipeline of the true FLUX.1-dev classes (distilled guidance)."""
    tokenizer = clip_tokenizer()
    t5_tokenizer = letters_of_t5(MAX_TOKENS)
    t5 = T5Config(vocab_size=len(t5_tokenizer), d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=small_vae(shift_factor=0.0),
        text_encoder=text_encoder(len(tokenizer), TEXT_WIDTHS[0]),
        tokenizer=tokenizer,
        text_encoder_2=random_model(T5EncoderModel, 8, t5),
        tokenizer_2=t5_tokenizer,
        transformer=flux_transformer(pooled_projection_dim=TEXT_WIDTHS[0]),
    )
    return quiet(pipe)


def wide_flux() -> FluxPipeline:
    """A FLUX.1-dev whose layers bitsandbytes can round on a CPU: widths of 64, three blocks of each kind."""
    pipe = small_flux()
    t5 = T5Config(vocab_size=len(pipe.tokenizer_2), d_model=64, d_kv=32, d_ff=128, num_layers=1, num_heads=2)
    sizes = {"in_channels": 16, "out_channels": None, "num_layers": 3, "num_single_layers": 3, "num_attention_heads": 4}
    widths = {"joint_attention_dim": 64, "pooled_projection_dim": TEXT_WIDTHS[0], "guidance_embeds": True}
    pipe.register_modules(
        text_encoder_2=random_model(T5EncoderModel, 8, t5),
        transformer=denoiser("FluxTransformer2DModel", scale=0.1, **sizes, **widths),
    )
    return pipe


def pixels(pipe: Any, prompt: str | list[str] = "a photo of a toy", *, seed: int = 0, **options: Any) -> Tensor:
    """Images (b, h, w, 3) in [0, 1] of a short run, the same for the same seed."""
    call = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 16, "width": 16, "output_type": "np"}
    if isinstance(pipe, FluxPipeline):
        call["max_sequence_length"] = MAX_TOKENS
    generator = torch.Generator().manual_seed(seed)
    return torch.from_numpy(pipe(prompt, generator=generator, **{**call, **options}).images)


def quiet(pipe: Any) -> Any:
    """`pipe` without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
