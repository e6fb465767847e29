"""Stable Diffusion 3 and 3.5: two CLIPs, and T5, which may be missing; latents as a grid; timestep N σ."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..family import Call, Conditions, Embeddings, Family


def _encode(pipe: Any, prompts: list[str], conditions: Conditions) -> Embeddings:
    length, skip = conditions.max_sequence_length, conditions.clip_skip
    states, _, pooled, _ = pipe.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=length, clip_skip=skip
    )
    return states, pooled


def _call(transformer: Any, call: Call) -> Tensor:
    states, pooled = call.embeddings
    return transformer(
        hidden_states=call.sample,
        timestep=call.timestep,
        encoder_hidden_states=states,
        pooled_projections=pooled,
        return_dict=False,
    )[0]


SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3 and 3.5",
    pipelines=("StableDiffusion3Pipeline",),
    parts=("prompt_embeds", "pooled"),
    encoder=_encode,
    caller=_call,
    divisor=lambda pipe: pipe.vae_scale_factor * pipe.transformer.config.patch_size,
    tokenizers=("tokenizer_3",),
    clips=("text_encoder", "text_encoder_2"),
    targets=(
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    ),
    defaults={
        "resolution": 1024, "guidance_scale": 7.0, "num_inference_steps": 28, "weighting_scheme": "logit_normal"
    },
    conditions=Conditions(max_sequence_length=256),
    tags=("stable-diffusion-3",),
)  # fmt: skip
