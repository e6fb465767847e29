"""Z-Image: states of Qwen3, as many as a prompt has tokens; timestep 1 − σ; it predicts the negative velocity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import Call, Conditions, Embeddings, Family, stack_padded
from .common import N, patches_divisor


def _encode(pipe: Any, prompts: list[str], conditions: Conditions) -> Embeddings:
    """States (b, l, d) and their mask (b, l), 1 for text and 0 for padding."""
    states, _ = pipe.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=conditions.max_sequence_length
    )
    kept = [torch.ones(len(own), dtype=torch.int64, device=own.device) for own in states]
    return stack_padded(states), stack_padded(kept)


def _call(transformer: Any, call: Call) -> Tensor:
    states, kept = call.embeddings
    frames = transformer(
        list(call.sample[:, :, None].unbind(0)),  # b times (c, 1, h, w)
        (N - call.timestep.float()) / N,  # as the pipeline rounds it: the transformer multiplies it by N
        [own[mask.bool()] for own, mask in zip(states, kept, strict=True)],
        return_dict=False,
    )[0]
    return -torch.stack(frames)[:, :, 0]


Z_IMAGE = Family(
    name="z_image",
    title="Z-Image",
    pipelines=("ZImagePipeline",),
    parts=("prompt_embeds", "prompt_mask"),
    encoder=_encode,
    caller=_call,
    divisor=patches_divisor,
    tokenizers=("tokenizer",),
    defaults={"resolution": 1024, "guidance_scale": 5.0, "num_inference_steps": 30},
    conditions=Conditions(max_sequence_length=512),
    tags=("z-image",),
)
