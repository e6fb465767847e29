"""Give a T-LoRA of LyCORIS the weights of ComfyUI's model, under the names of Diffusers' modules.

LyCORIS' start factors come from the base's weights (`nara_diffusion.loaders.base_factors`). A matrix
of the original code that has several of Diffusers' modules is split into their rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nara_diffusion.export.original_names import MLP_RATIO, parts_of
from nara_diffusion.loaders.lycoris import dotted

ROOT = "diffusion_model."
"""The prefix of the denoiser's keys in ComfyUI's model."""


def base_weights(patcher: Any) -> dict[str, Tensor]:
    """Return {module: its weight before any patch} for the denoiser of a `ModelPatcher`."""
    weights = {}
    for key, (entry, *_) in patcher.get_key_patches(ROOT).items():
        weight = entry[0] if isinstance(entry, tuple) else entry
        weights[key.removeprefix(ROOT).removesuffix(".weight")] = weight
    return weights


def as_in_diffusers(
    keys: Iterable[str], base: str, model: nn.Module, weights: Mapping[str, Tensor]
) -> nn.Module:
    """Return a model of the layers that a file of LyCORIS adapts, by their names in Diffusers.

    Args:
        keys: the keys of the file's tensors.
        base: one of `nara_diffusion.export.host_files.BASES`.
        model: ComfyUI's denoiser.
        weights: {module: weight} of the denoiser.

    Raises:
        ValueError: the denoiser has no such module.
    """
    root = nn.Module()
    for name, parts in parts_of({dotted(key.partition(".")[0]) for key in keys}, base).items():
        if name not in weights:
            raise ValueError(
                f"{name} isn't in this model. Choose the base and the checkpoint that the adapter was trained on."
            )
        weight = weights[name]
        unit = len(weight) // {1: 1, 3: 3, 4: 3 + MLP_RATIO}[len(parts)]
        sizes = [unit, unit, unit, MLP_RATIO * unit][: len(parts)]
        is_modulation = base == "sd3" and name.endswith("context_block.adaLN_modulation.1")
        if is_modulation and len(weight) == 2 * weight.shape[1]:
            # in SD3's last block, Diffusers has scale, then shift; the original code the reverse
            weight = torch.cat(weight.chunk(2)[::-1])
        for part, rows in zip(parts, weight.split(sizes), strict=True):
            if part is not None:
                place: Any = root
                *parents, last = part.split(".")
                for parent in parents:
                    place = place._modules.setdefault(parent, nn.Module())
                place.add_module(last, layer_with(rows, model.get_submodule(name)))
    return root


def layer_with(weight: Tensor, module: Any) -> nn.Module:
    """Return a layer with this weight, and the padding of a convolution `module`."""
    layer: Any = nn.Linear(1, 1, bias=False, device="meta")
    if weight.dim() > 2:
        kernel, padding = module.kernel_size, module.padding
        layer = nn.Conv2d(1, 1, kernel, padding=padding, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return layer
