"""Conversion of ComfyUI's names of a LoRA's tensors to kohya's, which Diffusers' converters read.

    diffusion_model.input_blocks.4.1.….to_q.lora_up.weight         lora_unet_input_blocks_4_1_…_to_q.lora_up.weight
    text_encoders.clip_l.transformer.text_model.….q_proj.…         lora_te1_text_model_…_q_proj.…
    text_encoders.clip_g.transformer.text_model.….q_proj.…         lora_te2_text_model_…_q_proj.…

ComfyUI writes lora_up and lora_down; other programs write lora_B and lora_A with the same module names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
from torch import Tensor

_MODEL = "diffusion_model."
_KINDS = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_down.weight": "lora_down.weight",
    "lora_up.weight": "lora_up.weight",
    "alpha": "alpha",
}
_KEY = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _KINDS))})")
_TEXT = re.compile(r"(?:text_encoders\.)?clip_([lg])\.(?:transformer\.)?(.+)")
_ENCODERS = {"l": "lora_te1_", "g": "lora_te2_"}


def with_kohya_names(tensors: Mapping[str, Tensor], kind: type, has_unet: bool) -> dict[str, Tensor]:
    """Rename ComfyUI's keys in `tensors` to kohya's where the pipeline's converter doesn't read ComfyUI's.

    Args:
        kind: the class of the pipeline. has_unet: whether its denoiser is a UNet.
    """
    if not any(key.startswith(_MODEL) or _TEXT.fullmatch(key) for key in tensors):
        return dict(tensors)
    if has_unet:
        return {_of_unet(key): tensor for key, tensor in tensors.items()}
    if issubclass(kind, FluxLoraLoaderMixin):
        return {_with_kind(key): tensor for key, tensor in tensors.items()}
    return dict(tensors)


def _of_unet(key: str) -> str:
    match = _KEY.fullmatch(key)
    if match is None:
        return key
    name, ending = match[1], _KINDS[match[2]]
    text = _TEXT.fullmatch(name)
    if text is not None:
        return f"{_ENCODERS[text[1]]}{_joined(text[2])}.{ending}"
    return f"lora_unet_{_joined(name.removeprefix(_MODEL))}.{ending}" if name.startswith(_MODEL) else key


def _with_kind(key: str) -> str:
    match: Any = _KEY.fullmatch(key)
    return key if match is None else f"{match[1]}.{_KINDS[match[2]]}"


def _joined(name: str) -> str:
    return name.replace(".", "_")
