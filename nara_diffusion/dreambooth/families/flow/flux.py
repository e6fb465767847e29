"""FLUX.1: states of T5, pooled state of CLIP; tokens with positions in place of a grid; the timestep is σ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import Call, Conditions, Embeddings, Family
from .common import fit_guidance, guidance_of, patches_divisor, sigma_of
from .packing import grid_ids, pack, unpack


def _encode(pipe: Any, prompts: list[str], conditions: Conditions) -> Embeddings:
    states, pooled, _ = pipe.encode_prompt(prompts, None, max_sequence_length=conditions.max_sequence_length)
    return states, pooled


def _call(transformer: Any, call: Call) -> Tensor:
    states, pooled = call.embeddings
    height, width = call.sample.shape[2:]
    device, dtype = call.sample.device, call.sample.dtype
    tokens = transformer(
        hidden_states=pack(call.sample),
        timestep=sigma_of(call),
        guidance=guidance_of(transformer, call),
        pooled_projections=pooled,
        encoder_hidden_states=states,
        txt_ids=torch.zeros(states.shape[1], 3, device=device, dtype=dtype),
        img_ids=grid_ids(height // 2, width // 2, 3, device).to(dtype),
        return_dict=False,
    )[0]
    return unpack(tokens, height, width)


ATTENTION_AND_FEED_FORWARD = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
)  # fmt: skip

FLUX = Family(
    name="flux",
    title="FLUX.1",
    pipelines=("FluxPipeline",),
    parts=("prompt_embeds", "pooled"),
    encoder=_encode,
    caller=_call,
    divisor=patches_divisor,
    tokenizers=("tokenizer_2",),
    targets=ATTENTION_AND_FEED_FORWARD,
    defaults={"resolution": 1024, "guidance_scale": 3.5, "num_inference_steps": 28},
    conditions=Conditions(max_sequence_length=512, guidance=3.5),
    fit=fit_guidance,
    tags=("flux",),
)
