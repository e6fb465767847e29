"""Tiny random denoisers of the true Diffusers classes, each with inputs for a batch, its timestep left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from tests.helpers.image_denoisers import IMAGES
from tests.helpers.video_denoisers import VIDEOS

Inputs = dict[str, Any]

_UNET = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "cross_attention_dim": 6,
}


def _blocks(suffix: str) -> dict[str, Any]:
    return {
        "down_block_types": (f"CrossAttnDownBlock{suffix}", f"DownBlock{suffix}"),
        "up_block_types": (f"UpBlock{suffix}", f"CrossAttnUpBlock{suffix}"),
    }


UNETS: dict[str, tuple[dict[str, Any], Callable[[int], dict[str, Any]]]] = {
    "UNet2DConditionModel": (
        {**_UNET, **_blocks("2D"), "attention_head_dim": 2},
        lambda b: {"sample": torch.randn(b, 3, 8, 8), "encoder_hidden_states": torch.randn(b, 5, 6)},
    ),
    "UNet3DConditionModel": (
        {**_UNET, **_blocks("3D"), "attention_head_dim": 2},
        lambda b: {"sample": torch.randn(b, 3, 4, 8, 8), "encoder_hidden_states": torch.randn(b, 5, 6)},
    ),
    "UNetMotionModel": (
        {**_UNET, **_blocks("Motion"), "num_attention_heads": 2, "motion_num_attention_heads": 2},
        lambda b: {  # the text is repeated for each frame, as the pipeline does
            "sample": torch.randn(b, 3, 4, 8, 8),
            "encoder_hidden_states": torch.randn(b, 5, 6).repeat_interleave(4, dim=0),
        },
    ),
}

DENOISERS: dict[str, tuple[dict[str, Any], Callable[[int], Inputs]]] = {**UNETS, **IMAGES, **VIDEOS}
"""Class name → (the arguments of its constructor, its inputs for a batch of that size)."""


def denoiser(name: str, **changes: Any) -> nn.Module:
    """A random model of the Diffusers class `name`, in evaluation mode; no parameter is zero."""
    if name.startswith("Cosmos"):
        pytest.importorskip("torchvision", reason="Diffusers' Cosmos resizes its padding mask with torchvision")
    torch.manual_seed(3)
    options, _ = DENOISERS[name]
    model = getattr(diffusers, name)(**{**options, **changes}).eval()
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():  # Diffusers starts gates and last layers at zero, which hides adapters
        scale = 0.3 if parameter.dim() > 1 else 0.1
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model


def inputs_of(name: str, batch: int = 2) -> Inputs:
    """What `denoiser(name)` takes beside its timestep."""
    torch.manual_seed(5)
    return DENOISERS[name][1](batch)


_SHARED = ("position_ids", "padding_mask", "image_rotary_emb", "added_cond_kwargs", "cross_attention_kwargs")


def sample_of(inputs: Inputs, index: int, batch: int) -> Inputs:
    """The inputs of one sample of a batch; an input may have several rows a sample."""

    def part(key: str, value: Any) -> Any:
        if key == "encoder_hidden_states_llama3":  # (layers, b, l, d)
            return value[:, index : index + 1]
        if key in _SHARED or not hasattr(value, "__len__") or (key.endswith("_ids") and value.dim() == 2):
            return value
        rows = len(value) // batch
        return value[index * rows : (index + 1) * rows]

    return {key: part(key, value) for key, value in inputs.items()}


def tensor_of(output: Any) -> Tensor:
    """The prediction in what a denoiser returns: most give an object, some a list with one tensor a sample."""
    sample = output[0]
    return torch.stack(sample) if isinstance(sample, list) else sample
