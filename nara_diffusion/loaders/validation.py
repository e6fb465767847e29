"""Checks that an adapter's part fits a component of a pipeline, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.cores.registry import needs_noise
from nara_diffusion.layers.dispatch import factor_dtype
from nara_diffusion.noise.denoisers.lookup import denoiser_of
from nara_diffusion.tuner.holder.core_holder import HOLDER_NAME, holder_of
from nara_diffusion.tuner.holder.core_set import core_group, core_tensors
from nara_diffusion.tuner.holder.noise_convention import NoiseConventions
from nara_diffusion.tuner.state_dict import check_adapter_tensors
from nara_diffusion.utils.listing import listed

from .format import AdapterPart, is_core_key

TEXT_ENCODER = "text_encoder"
"""The beginning of the names of the text encoders' components."""

_OTHER_BASE = "It was trained on another base model: load the pipeline that it was trained on."


def check_part(model: nn.Module, component: str, part: AdapterPart, adapter_name: str) -> None:
    """Raises ValueError if `part` does not fit `model`, the pipeline's `component`."""
    check_storable(part.config, component)
    modules = dict(base_modules(model))
    adapted = {_module_of(key) for key in part.tensors if not is_core_key(key)}
    unknown = sorted(adapted - modules.keys())
    if unknown:
        raise ValueError(f"{component} ({type(model).__name__}) has no module {listed(unknown)}. {_OTHER_BASE}")
    targets = {name for name in modules if check_target_module_exists(part.config, name)}
    if targets - adapted:
        raise ValueError(
            f"The adapter's target_modules select {listed(sorted(targets - adapted))} in {component}, for which it has "
            f"no tensors: a part of its keys is missing, or it was trained on another base model."
        )
    if adapted - targets:
        raise ValueError(
            f"The adapter holds tensors for {listed(sorted(adapted - targets))} in {component}, which its own "
            "target_modules do not select: damaged."
        )
    for name in sorted(adapted):
        _check_fits_layer(modules[name], f"{component}.{name}", rank_of(part.config, name), part, name)
    expected = expected_tensors(model, part)
    check_adapter_tensors(part.tensors, expected, expected, f"{HOLDER_NAME}.")
    for key, tensor in part.tensors.items():
        if not is_core_key(key):
            _check_range(_base_layer(modules[_module_of(key)]), f"{component}.{key}", tensor)
    _check_convention(model, part.config, adapter_name)


def check_storable(config: NaraConfig, component: str) -> None:
    """Raises ValueError if the adapter cannot run in `component`, or if unloading it could not restore the base."""
    if component.startswith(TEXT_ENCODER) and needs_noise(config):
        raise ValueError(
            f"The adapter of {component} has core_type={config.core_type!r}, but text encoders run before there is a "
            'λ: use NaraConfig(core_type="identity", …) there.'
        )
    for field in ("modules_to_save", "trainable_token_indices", "target_parameters"):
        if getattr(config, field, None):
            raise ValueError(_refusal(component, f"{field}={getattr(config, field)!r}"))
    if config.bias != "none":
        raise ValueError(_refusal(component, f"bias={config.bias!r}"))
    if config.changes_base:
        raise ValueError(_refusal(component, f"init_lora_weights={config.init_lora_weights!r}"))


def _refusal(component: str, what: str) -> str:
    return (
        f"The adapter of {component} has {what}, which changes the base model itself, so that unloading could not give "
        "it back: train without it, or use peft.PeftModel's save_pretrained and from_pretrained on the component."
    )


def expected_tensors(model: nn.Module, part: AdapterPart) -> dict[str, Tensor]:
    """{key: meta tensor of the required shape} of all tensors that `part` has to have."""
    config, modules = part.config, dict(base_modules(model))
    expected: dict[str, Tensor] = {}
    groups: dict[str, int] = {}
    for name in {_module_of(key): None for key in part.tensors if not is_core_key(key)}:
        rank = rank_of(config, name)
        shapes = _shapes(_base_layer(modules[name]), rank, config)
        expected |= {f"{name}.{key}": torch.empty(shape, device="meta") for key, shape in shapes.items()}
        group = core_group(config, name, rank)
        groups[group] = max(rank, groups.get(group, 0))
    core = core_tensors(config, groups)
    return expected | {f"{HOLDER_NAME}.{key}": tensor for key, tensor in core.items()}


def _shapes(layer: Any, rank: int, config: NaraConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of one adapted layer, as PEFT names them in a checkpoint."""
    if isinstance(layer, nn.Embedding):
        return {
            "lora_embedding_A": (rank, layer.num_embeddings),
            "lora_embedding_B": (layer.embedding_dim, rank),
        }
    if isinstance(layer, nn.modules.conv._ConvNd):
        ones = (1,) * len(layer.kernel_size)
        d_out, magnitude = layer.out_channels, (1, layer.out_channels, *ones)
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A.weight": (rank, layer.in_channels, *layer.kernel_size),
            "lora_B.weight": (d_out, rank // layer.groups, *ones),
        }
    else:
        d_in, d_out = _get_in_out_features(layer)
        if d_in is None or d_out is None:
            raise ValueError(f"The adapter adapts a {type(layer).__name__}, a type of layer that NaRA doesn't adapt.")
        magnitude = (d_out,)
        shapes = {"lora_A.weight": (rank, d_in), "lora_B.weight": (d_out, rank)}
    if config.lora_bias:
        shapes["lora_B.bias"] = (d_out,)
    if config.use_dora:
        shapes["lora_magnitude_vector"] = magnitude
    return shapes


def _check_fits_layer(layer: nn.Module, where: str, rank: int, part: AdapterPart, name: str) -> None:
    """Raises ValueError, with the likely cause, if A and B are of another base model or of another rank."""
    shapes = _shapes(_base_layer(layer), rank, part.config)
    for key, row in (("lora_A.weight", 0), ("lora_B.weight", 1)):
        tensor, shape = part.tensors.get(f"{name}.{key}"), shapes.get(key)
        if tensor is None or shape is None or tensor.dim() < 2:
            continue
        if len(shape) != tensor.dim() or tensor.shape[1 - row] != shape[1 - row]:
            raise ValueError(
                f"{key} of {where} has shape {tuple(tensor.shape)} in the adapter, this layer needs {shape}. "
                f"{_OTHER_BASE}"
            )
        if tensor.shape[row] != shape[row]:
            raise ValueError(
                f"{key} of {where} has shape {tuple(tensor.shape)}, but the adapter's configuration says rank {rank}, "
                f"which is {shape}: the tensors and the configuration are not of one adapter."
            )


def _check_range(layer: nn.Module, where: str, tensor: Tensor) -> None:
    """Raises ValueError if a factor becomes infinite in the dtype of its layer."""
    dtype = factor_dtype(getattr(getattr(layer, "weight", None), "dtype", None))
    if dtype is None or bool(tensor.to(dtype).isfinite().all()):
        return
    raise ValueError(
        f"{where} has a value of {tensor.float().abs().max().item():g}, and its layer is {dtype}, which ends at "
        f"{torch.finfo(dtype).max:g}: load the pipeline in bfloat16 or float32."
    )


def _check_convention(model: nn.Module, config: NaraConfig, adapter_name: str) -> None:
    holder = holder_of(model)
    fresh = NoiseConventions(denoiser_of(model), config.noise_convention)
    (fresh if holder is None else holder.conventions).completed(adapter_name, config)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the base model's modules, adapted ones as their tuner layers; no adapters, no cores."""
    left = [("", model)]
    while left:
        prefix, module = left.pop()
        for name, child in module._modules.items():
            if child is None or getattr(type(child), "is_core_holder", False):
                continue
            path = f"{prefix}{name}"
            yield path, child
            if not isinstance(child, BaseTunerLayer):
                left.append((f"{path}.", child))


def check_has_modules(model: nn.Module, names: Set[str], origin: str) -> None:
    """Raises ValueError if `model` lacks one of the modules that the adapter of `origin` adapts."""
    unknown = sorted(names - {name for name, _ in base_modules(model)})
    if unknown:
        raise ValueError(
            f"{origin} adapts {len(names)} modules, of which {type(model).__name__} lacks {len(unknown)}: "
            f"{listed(unknown)}. It was trained on another base model, or belongs to another component of the pipeline."
        )


def _base_layer(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _module_of(key: str) -> str:
    """down.0.to_q.lora_A.weight → down.0.to_q"""
    return key.partition(".lora_")[0]


def rank_of(config: NaraConfig, name: str) -> int:
    """The rank of the adapted module of that name."""
    return by_pattern(config.rank_pattern, name, config.r)


def by_pattern(pattern: dict[str, int] | None, name: str, default: int) -> int:
    """The value of PEFT's rank_pattern or alpha_pattern for a module."""
    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), name), default)  # type: ignore[arg-type]
