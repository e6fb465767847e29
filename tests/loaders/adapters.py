"""Adapters on the small pipelines, as training leaves them."""

from __future__ import annotations

from typing import Any

from peft import inject_adapter_in_model

from tests.helpers.adapted import disturb, nara_config
from tests.helpers.small_pipelines import small_sdxl

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "time_emb_proj"]
TEXT_TARGETS = ["q_proj", "v_proj", "fc1"]
FILE = "pytorch_nara_weights.safetensors"


def trained(pipe: Any = None, *, name: str = "default", text: bool = True, **changes: Any) -> Any:
    """SDXL's pipeline with one NaRA, on its UNet and, as static adapters, on its text encoders."""
    pipe = small_sdxl() if pipe is None else pipe
    pipe.unet.add_adapter(nara_config(**{"target_modules": UNET_TARGETS, "lora_alpha": 3, **changes}), name)
    encoders = [pipe.text_encoder, pipe.text_encoder_2] if text else []
    for rank, part in enumerate(encoders, start=2):
        config = nara_config(core_type="identity", r=rank, lora_alpha=3, target_modules=TEXT_TARGETS)
        inject_adapter_in_model(config, part, name)
    for seed, part in enumerate([pipe.unet, *encoders]):
        disturb(part, seed)
    return pipe
