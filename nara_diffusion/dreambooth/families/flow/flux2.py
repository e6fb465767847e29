"""FLUX.2 and FLUX.2 [klein]: states of a language model; normalised latents as tokens with positions; timestep σ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import Call, Conditions, Embeddings, Family
from .common import fit_guidance, guidance_of, patches_divisor, sigma_of
from .packing import grid_ids


def _encode(pipe: Any, prompts: list[str], conditions: Conditions) -> Embeddings:
    states, _ = pipe.encode_prompt(prompts, max_sequence_length=conditions.max_sequence_length)
    return (states,)


def _call(transformer: Any, call: Call) -> Tensor:
    (states,) = call.embeddings
    b, _, height, width = call.sample.shape  # of patches
    device = call.sample.device
    text_ids = torch.zeros(b, states.shape[1], 4, dtype=torch.int64, device=device)
    text_ids[..., 3] = torch.arange(states.shape[1], device=device)
    tokens = transformer(
        hidden_states=call.sample.flatten(2).transpose(1, 2),  # (b, h w, c)
        timestep=sigma_of(call),
        guidance=guidance_of(transformer, call),
        encoder_hidden_states=states,
        txt_ids=text_ids,
        img_ids=grid_ids(height, width, 4, device).long().expand(b, -1, -1),
        return_dict=False,
    )[0]
    return tokens.transpose(1, 2).reshape(call.sample.shape)


FLUX2 = Family(
    name="flux2",
    title="FLUX.2",
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    parts=("prompt_embeds",),
    encoder=_encode,
    caller=_call,
    divisor=patches_divisor,
    tokenizers=("tokenizer",),
    defaults={"resolution": 1024, "guidance_scale": 4.0, "num_inference_steps": 28},
    conditions=Conditions(max_sequence_length=512, guidance=4.0),
    fit=fit_guidance,
    tags=("flux-2",),
)
