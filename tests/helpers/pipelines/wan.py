"""A tiny Wan pipeline of the true class, with one transformer or, as Wan 2.2, with two by the level of noise."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor

from tests.helpers.denoisers.models import denoiser


def small_wan(*, scheduler: Any = None, transformers: int = 1, **options: Any) -> WanPipeline:
    """Without text encoder: `wan_latents` passes embeddings. Two transformers share the range of λ at 0.7."""
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    second = denoiser("WanTransformer3DModel") if transformers == 2 else None
    for parameter in [] if second is None else second.parameters():
        parameter.data *= 1.1
    pipe = WanPipeline(
        tokenizer=None,  # type: ignore[arg-type]
        text_encoder=None,  # type: ignore[arg-type]
        vae=vae,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=denoiser("WanTransformer3DModel"),  # type: ignore[arg-type]
        transformer_2=second,  # type: ignore[arg-type]
        boundary_ratio=None if second is None else 0.7,
        **options,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan_latents(pipe: Any, prompts: int = 2, *, guided: bool = True, **options: Any) -> Tensor:
    """What four steps with guidance leave before decoding, the same at each call."""
    generator = torch.Generator().manual_seed(1)
    text = [torch.randn(prompts, 5, 8, generator=generator) for _ in range(2)]
    call = {"num_inference_steps": 4, "guidance_scale": 4.0, "height": 32, "width": 32, "num_frames": 5, **options}
    embeds = {"prompt_embeds": text[0], **({"negative_prompt_embeds": text[1]} if guided else {})}
    return pipe(**embeds, generator=generator, output_type="latent", **call).frames
