"""The SDXL pipeline that is trained, and the pipeline that samples: two pipelines, one set of frozen weights.

The sampling pipeline has modules of its own around the parameters of the trained one, so that adapters and gradient
checkpointing reach only one of them. `load_nara_weights` on it gives what a user gets from a freshly loaded pipeline,
without a second copy of the base model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from peft import PeftConfig
from torch import nn

from nara_diffusion.training.adapters.pissa import takes_start_from_base


def load_pipeline(
    name: str,
    *,
    dtype: torch.dtype,
    vae_name: str | None = None,
    vae_dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
) -> Any:
    """A frozen StableDiffusionXLPipeline on the CPU.

    Args:
        name: folder, or id on the Hub.
        dtype: of all but the autoencoder.
        vae_name: another autoencoder's folder or id; None takes the pipeline's own.
        vae_dtype: of the autoencoder.
        revision, variant: of the pipeline, and of its own autoencoder; variant is for example "fp16".

    Raises:
        ValueError: there is no such pipeline or autoencoder, or it isn't SDXL's base model.
    """
    hub = {"revision": revision, "variant": variant, "cache_dir": cache_dir}
    vae_source = {"subfolder": "vae", **hub} if vae_name is None else {"cache_dir": cache_dir}
    try:
        vae: Any = AutoencoderKL.from_pretrained(vae_name or name, dtype=vae_dtype, **vae_source)
        # without a dtype Diffusers loads float32, whatever the file holds
        pipe: Any = StableDiffusionXLPipeline.from_pretrained(name, vae=vae, dtype=dtype, **hub)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        what = f"pretrained_model_name_or_path {name}" + (f" with the autoencoder {vae_name}" if vae_name else "")
        raise ValueError(
            f"{what} can't be loaded as Stable Diffusion XL: {str(error).rstrip('.')}. Name a folder with a "
            "model_index.json, or an id on the Hub."
        ) from error
    check_sdxl(pipe, name)
    for module in (pipe.vae, pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        module.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_sdxl(pipe: Any, name: str) -> None:
    """Refuses what has other conditioning than SDXL's base model.

    Raises:
        ValueError: naming what is missing.
    """
    if pipe.unet.config.addition_embed_type != "text_time" or pipe.text_encoder_2 is None:
        raise ValueError(
            f"{name} is another model than Stable Diffusion XL: its UNet has addition_embed_type "
            f"{pipe.unet.config.addition_embed_type!r}, expected 'text_time' and two text encoders."
        )
    if pipe.text_encoder is None or pipe.tokenizer is None:
        raise ValueError(f"{name} has no first text encoder: SDXL's refiner can't be trained so, name its base model.")


def sharing_pipeline(pipe: Any, dtype: torch.dtype) -> Any:
    """A pipeline with modules of its own around the parameters of `pipe`, its autoencoder in `dtype`.

    Make it before anything is added to `pipe`. A user's pipeline loaded in `dtype` computes the same bits.
    """
    names = ("vae", "unet", "text_encoder", "text_encoder_2")
    memo = {id(t): t for name in names for t in _tensors(getattr(pipe, name))}
    modules = {name: copy.deepcopy(getattr(pipe, name), memo) for name in names}
    if pipe.vae.dtype != dtype:
        modules["vae"] = copy.deepcopy(pipe.vae).to(dtype)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    other = type(pipe)(
        **{**pipe.components, **modules, "scheduler": scheduler},
        force_zeros_for_empty_prompt=pipe.config.force_zeros_for_empty_prompt,
        add_watermarker=getattr(pipe, "watermark", None) is not None,
    )
    other.set_progress_bar_config(disable=True)
    return other


def sampling_pipeline(pipe: Any, config: PeftConfig | None, dtype: torch.dtype, load: Callable[..., Any]) -> Any:
    """The pipeline that samples while `pipe` is trained with an adapter of `config`.

    Make it before the adapter is added. It shares the parameters of `pipe`, unless training changes those: then `load`
    makes another pipeline.
    """
    if config is None or takes_start_from_base(config):
        return load(dtype=dtype, vae_dtype=dtype).to(pipe.device)
    return sharing_pipeline(pipe, dtype)


def model_name(name: str) -> str:
    """What people call a model: the end of a path or id."""
    return Path(name).name


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
