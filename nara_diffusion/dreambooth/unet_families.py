"""The families with a UNet: Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from .families import Call, Family


def _unet_divisor(pipe: DiffusionPipeline) -> int:
    """Return the ratio of an image's side to that of the UNet's smallest feature map."""
    return pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)


SD = Family(
    name="stable-diffusion",
    title="Stable Diffusion 1 and 2",
    pipelines=("StableDiffusionPipeline",),
    # states (b, 77, d)
    encoder=lambda pipe, prompts, length: pipe.encode_prompt(
        prompts, pipe.text_encoder.device, 1, False
    )[:1],
    inputs=lambda call: {
        "sample": call.sample,
        "timestep": call.timestep,
        "encoder_hidden_states": call.embeddings[0],
    },
    divisor=_unet_divisor,
    denoiser="unet",
    text_encoders=("text_encoder",),
    defaults={"resolution": 512, "guidance_scale": 7.5},
    can_be_distilled=True,
    is_flow=False,
)


def _sdxl_inputs(call: Call) -> dict[str, Any]:
    states, pooled = call.embeddings
    # bf16 can't represent all integers above 256, such as sizes and crop positions
    conditions = {"text_embeds": pooled, "time_ids": call.time_ids.float()}
    return {**SD.inputs(call), "encoder_hidden_states": states, "added_cond_kwargs": conditions}


def _fit_sdxl(pipe: DiffusionPipeline, family: Family) -> Family:
    kind = pipe.unet.config.addition_embed_type
    if kind != "text_time" or pipe.text_encoder is None or pipe.text_encoder_2 is None:
        raise ValueError(
            f"its UNet has addition_embed_type {kind!r}. Expected 'text_time' and two text encoders: name SDXL's base "
            "model, not its refiner."
        )
    return family


SDXL = Family(
    name="stable-diffusion-xl",
    title="Stable Diffusion XL",
    pipelines=("StableDiffusionXLPipeline",),
    # states of two CLIPs (b, 77, d_1 + d_2), and the pooled state of the second (b, p)
    encoder=lambda pipe, prompts, length: pipe.encode_prompt(
        prompts, device=pipe.text_encoder.device, do_classifier_free_guidance=False
    )[::2],
    inputs=_sdxl_inputs,
    divisor=_unet_divisor,
    denoiser="unet",
    text_encoders=("text_encoder", "text_encoder_2"),
    cut_short=("text_encoder",),
    can_be_distilled=True,
    is_flow=False,
    fit=_fit_sdxl,
)
