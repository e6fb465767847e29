"""Wan, with images as videos of one frame: states of UMT5; timestep N σ, or one for each token (Wan 2.2's 5B)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..family import Call, Conditions, Embeddings, Family


def _encode(pipe: Any, prompts: list[str], conditions: Conditions) -> Embeddings:
    states, _ = pipe.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=conditions.max_sequence_length
    )
    return (states,)


def _call(transformer: Any, call: Call) -> Tensor:
    timestep, (height, width) = call.timestep, call.sample.shape[2:]
    if call.conditions.timestep_of_tokens:
        timestep = timestep[:, None].expand(-1, (height // 2) * (width // 2))
    return transformer(
        hidden_states=call.sample[:, :, None],  # (b, c, 1, h, w)
        timestep=timestep,
        encoder_hidden_states=call.embeddings[0],
        return_dict=False,
    )[0][:, :, 0]


def _fit(pipe: Any, family: Family) -> Family:
    if pipe.transformer is None or pipe.transformer_2 is not None:
        raise ValueError(
            "it has two transformers, one for high and one for low noise, like Wan 2.2's 14B: expected one, as in Wan "
            "2.1 and Wan 2.2's 5B."
        )
    return family.with_conditions(timestep_of_tokens=bool(pipe.config.expand_timesteps))


WAN = Family(
    name="wan",
    title="Wan (one frame)",
    pipelines=("WanPipeline",),
    parts=("prompt_embeds",),
    encoder=_encode,
    caller=_call,
    divisor=lambda pipe: pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[1],
    tokenizers=("tokenizer",),
    defaults={"resolution": 512, "guidance_scale": 5.0, "num_inference_steps": 30},
    conditions=Conditions(max_sequence_length=512),
    fit=_fit,
    sampling=lambda call, count: call | {"num_frames": 1},
    images_of=lambda output: output.frames[:, 0],
    dtype_of=lambda transformer: transformer.patch_embedding.weight.dtype,  # others stay float32
    picked=".frames[0, 0]",
    tags=("wan",),
)
