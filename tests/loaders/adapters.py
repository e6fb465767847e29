"""Adapters on the small pipelines, as training leaves them."""

from __future__ import annotations

from typing import Any

import torch
from peft import inject_adapter_in_model
from torch import nn

from tests.helpers.adapted import nara_config
from tests.helpers.small_pipelines import small_sdxl

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "time_emb_proj"]
TEXT_TARGETS = ["q_proj", "v_proj", "fc1"]
FILE = "pytorch_nara_weights.safetensors"


def shake(model: nn.Module, seed: int, scale: float = 0.2) -> None:
    """Give every trainable tensor of the adapters another value: no zero and no identity is left to hide behind."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "nara_core" in name:
            noise = scale * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise.abs() + 0.5 if "magnitude" in name else noise)


def trained(pipe: Any = None, *, seed: int = 1, name: str = "default", text: bool = True, **changes: Any) -> Any:
    """A pipeline with one NaRA, on its denoiser and, as static adapters, on its text encoders."""
    pipe = small_sdxl() if pipe is None else pipe
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    options = {"target_modules": UNET_TARGETS, "lora_alpha": 3, **changes}
    denoiser.add_adapter(nara_config(**options), name)
    shake(denoiser, seed)
    for index, part in enumerate(("text_encoder", "text_encoder_2")):
        if text and part in pipe.components:
            model = getattr(pipe, part)
            inject_adapter_in_model(
                nara_config(core_type="identity", r=2 + index, lora_alpha=3, target_modules=TEXT_TARGETS), model, name
            )
            shake(model, seed + 10 + index)
    return pipe
