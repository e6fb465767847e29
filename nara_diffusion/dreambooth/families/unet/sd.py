"""Stable Diffusion 1 and 2: last states of one CLIP."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..family import TRANSFORMER_TARGETS, Call, Conditions, Embeddings, Family
from .clip import tokenize_prompts
from .common import unet_divisor
from .long_prompts import encode_long_prompts, is_long


def _encode(pipe: Any, prompts: list[str], conditions: Conditions) -> Embeddings:
    length = conditions.max_sequence_length
    if length is not None and is_long(length):
        return encode_long_prompts([pipe.tokenizer], [pipe.text_encoder], prompts, length)
    (ids,) = tokenize_prompts([pipe.tokenizer], prompts)
    return (pipe.text_encoder(ids.to(pipe.text_encoder.device))[0],)


def _call(unet: Any, call: Call) -> Tensor:
    return unet(call.sample, call.timestep, encoder_hidden_states=call.embeddings[0], return_dict=False)[0]


SD = Family(
    name="sd",
    title="Stable Diffusion 1 and 2",
    pipelines=("StableDiffusionPipeline",),
    parts=("prompt_embeds",),
    encoder=_encode,
    caller=_call,
    divisor=unet_divisor,
    denoiser="unet",
    text_encoders=("text_encoder",),
    tokenizers=("tokenizer",),
    in_chunks=True,
    targets=TRANSFORMER_TARGETS,
    defaults={"resolution": 512, "guidance_scale": 7.5},
    no_clip_skip="can't be sampled so: its pipeline in Diffusers 0.42 asks for what transformers 5 has no more",
    is_flow=False,
    # the safety checker replaces images that it takes for unsafe by black ones
    loading={"safety_checker": None, "requires_safety_checker": False},
    tags=("stable-diffusion",),
)
