"""Stable Diffusion XL's base model: states and pooled state of two CLIPs, and the sizes of the image."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..family import TRANSFORMER_TARGETS, Call, Conditions, Embeddings, Family
from .clip import encode_prompts
from .common import unet_divisor
from .long_prompts import encode_long_prompts, is_long


def _encode(pipe: Any, prompts: list[str], conditions: Conditions) -> Embeddings:
    tokenizers, encoders = [pipe.tokenizer, pipe.tokenizer_2], [pipe.text_encoder, pipe.text_encoder_2]
    length = conditions.max_sequence_length
    if length is not None and is_long(length):
        return encode_long_prompts(tokenizers, encoders, prompts, length, conditions.clip_skip)
    return encode_prompts(tokenizers, encoders, prompts, conditions.clip_skip)


def _call(unet: Any, call: Call) -> Tensor:
    states, pooled = call.embeddings
    # bf16 doesn't hold all whole numbers above 256, which sizes and crop positions are
    conditions = {"text_embeds": pooled, "time_ids": call.time_ids.float()}
    return unet(
        call.sample, call.timestep, encoder_hidden_states=states, added_cond_kwargs=conditions, return_dict=False
    )[0]


def _fit(pipe: Any, family: Family) -> Family:
    kind = pipe.unet.config.addition_embed_type
    if kind != "text_time" or pipe.text_encoder_2 is None:
        raise ValueError(
            f"it is another model than Stable Diffusion XL: its UNet has addition_embed_type {kind!r}, expected "
            "'text_time', and two text encoders."
        )
    if pipe.text_encoder is None or pipe.tokenizer is None:
        raise ValueError("it has no first text encoder: SDXL's refiner can't be trained so, name its base model.")
    return family


SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    pipelines=("StableDiffusionXLPipeline",),
    parts=("prompt_embeds", "pooled"),
    encoder=_encode,
    caller=_call,
    divisor=unet_divisor,
    denoiser="unet",
    text_encoders=("text_encoder", "text_encoder_2"),
    tokenizers=("tokenizer", "tokenizer_2"),
    in_chunks=True,
    cut_short=("text_encoder",),
    targets=TRANSFORMER_TARGETS,
    clips=("text_encoder", "text_encoder_2"),
    is_flow=False,
    fit=_fit,
    tags=("stable-diffusion-xl",),
)
