"""Qwen-Image: states of Qwen2.5-VL and their mask; patches as tokens, with the shape of the grid; timestep σ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import Call, Conditions, Embeddings, Family
from .common import guidance_of, patches_divisor, sigma_of
from .packing import pack, unpack

_NO_PROMPT = " "
"""The negative prompt in Qwen-Image's documentation: without one, its pipeline has no guidance."""


def _encode(pipe: Any, prompts: list[str], conditions: Conditions) -> Embeddings:
    """States (b, l, d) and their mask (b, l), 1 for text and 0 for padding."""
    states, mask = pipe.encode_prompt(prompts, max_sequence_length=conditions.max_sequence_length)
    return states, torch.ones(states.shape[:2], dtype=torch.int64, device=states.device) if mask is None else mask


def _call(transformer: Any, call: Call) -> Tensor:
    states, mask = call.embeddings
    b, _, height, width = call.sample.shape
    tokens = transformer(
        hidden_states=pack(call.sample),
        timestep=sigma_of(call),
        guidance=guidance_of(transformer, call),
        encoder_hidden_states=states,
        encoder_hidden_states_mask=None if mask.all() else mask,
        img_shapes=[[(1, height // 2, width // 2)]] * b,
        return_dict=False,
    )[0]
    return unpack(tokens, height, width)


def _sampling(call: dict[str, Any], count: int) -> dict[str, Any]:
    """Rename guidance_scale to true_cfg_scale, and add a negative prompt for each image."""
    told = dict(call)
    scale = told.pop("guidance_scale", 1.0)
    return told if scale <= 1 else told | {"true_cfg_scale": scale, "negative_prompt": [_NO_PROMPT] * count}


def _fit(pipe: Any, family: Family) -> Family:
    if pipe.transformer.config.guidance_embeds:
        raise ValueError("its transformer has distilled guidance (guidance_embeds), which Qwen-Image doesn't have.")
    return family


QWEN_IMAGE = Family(
    name="qwen_image",
    title="Qwen-Image",
    pipelines=("QwenImagePipeline",),
    parts=("prompt_embeds", "prompt_mask"),
    encoder=_encode,
    caller=_call,
    divisor=patches_divisor,
    tokenizers=("tokenizer",),
    defaults={"resolution": 1024, "guidance_scale": 4.0, "num_inference_steps": 30},
    conditions=Conditions(max_sequence_length=512),
    fit=_fit,
    sampling=_sampling,
    tags=("qwen-image",),
)
