"""Tiny random denoisers of the true Diffusers classes, each with inputs for a batch, its timestep left out."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.denoisers.flux import FLUXES
from tests.helpers.denoisers.hunyuan import HUNYUANS
from tests.helpers.denoisers.images import IMAGES
from tests.helpers.denoisers.others import OTHER_SHAPES, OTHERS
from tests.helpers.denoisers.sound import SOUND_SHAPES, SOUNDS
from tests.helpers.denoisers.unets import MORE_UNETS
from tests.helpers.denoisers.videos import VIDEOS
from tests.helpers.denoisers.wan import WAN_SHAPES, WANS, Reference

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

DENOISERS: dict[str, tuple[dict[str, Any], Callable[[int], Inputs]]] = {
    **UNETS,
    **MORE_UNETS,
    **IMAGES,
    **FLUXES,
    **VIDEOS,
    **WANS,
    **HUNYUANS,
    **SOUNDS,
    **OTHERS,
}
"""Class name → (the arguments of its constructor, its inputs for a batch of that size)."""

_SHAPES = {**WAN_SHAPES, **SOUND_SHAPES, **OTHER_SHAPES}


def timestep_for(model: nn.Module, timestep: Any) -> Any:
    """A timestep (b,) in the shape that the class of `model` takes; others as they are."""
    shape = _SHAPES.get(type(model).__name__)
    return shape(timestep) if shape is not None and isinstance(timestep, Tensor) and timestep.dim() == 1 else timestep


_HOMES = {
    "WuerstchenPrior": "diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior",
    "WuerstchenDiffNeXt": "diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext",
}
"""Where classes are that `diffusers` itself has no name for."""


def class_of(name: str) -> Any:
    return getattr(importlib.import_module(_HOMES.get(name, "diffusers")), name)


def denoiser(name: str, **changes: Any) -> nn.Module:
    """A random model of the Diffusers class `name`, in evaluation mode; no parameter is zero."""
    if name.startswith("Cosmos"):
        pytest.importorskip("torchvision", reason="Diffusers' Cosmos resizes its padding mask with torchvision")
    torch.manual_seed(3)
    options, _ = DENOISERS[name]
    model = class_of(name)(**{**options, **changes}).eval()
    generator = torch.Generator().manual_seed(4)
    for (
        key,
        parameter,
    ) in model.named_parameters():  # Diffusers starts gates and last layers at zero, which hides adapters
        if ".experts." in key:  # which NucleusMoE leaves as the memory was
            parameter.data.zero_()
        scale = 0.3 if parameter.dim() > 1 else 0.1
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model


def inputs_of(name: str, batch: int = 2) -> Inputs:
    """What `denoiser(name)` takes beside its timestep."""
    torch.manual_seed(5)
    return DENOISERS[name][1](batch)


_SHARED = ("image_rotary_emb", "added_cond_kwargs", "cross_attention_kwargs", "visual_rope_pos")
_BY_PART = ("text_encoder_layers", "video_rotary_emb")


def sample_of(inputs: Inputs, index: int, batch: int) -> Inputs:
    """The inputs of one sample of a batch; an input may have several rows a sample.

    What a batch shares has another number of rows than a multiple of `batch`, or its name in `_SHARED`.
    """

    def part(key: str, value: Any) -> Any:
        if key == "encoder_hidden_states_llama3":  # (layers, b, l, d)
            return value[:, index : index + 1]
        if key in _BY_PART:
            return type(value)(part("", own) for own in value)
        if isinstance(value, dict) and key not in _SHARED:
            return {name: part(name, own) for name, own in value.items()}
        if key in _SHARED or not isinstance(value, (Tensor, list, Reference)) or len(value) % batch:
            return value
        rows = len(value) // batch
        return value[index * rows : (index + 1) * rows]

    return {key: part(key, value) for key, value in inputs.items()}


def tensor_of(output: Any) -> Tensor:
    """The prediction in what a denoiser returns: most give an object, some a list with one tensor a sample."""
    sample = output if isinstance(output, Tensor) else output[0]
    return torch.stack(sample) if isinstance(sample, list) else sample
