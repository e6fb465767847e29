"""Hotswap: replacing an adapter's weights in place, so that a compiled model is not recompiled.

The new adapter has the ranks of the old one: C(λ) is r × r. `enable_lora_hotswap(target_rank=r)`, with r its own rank,
makes the scales tensors, so that adapters with other lora_alpha don't recompile the model either.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.hotswap import _update_scaling, prepare_model_for_compiled_hotswap
from torch import nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.cores.registry import CustomCore, rebuild_core
from nara_diffusion.tuner.holder import holder_of
from nara_diffusion.tuner.strength import check_strength, give_strength, layers_of, strength_of

from .file import AdapterPart, by_pattern, configured_scaling
from .insertion import adapters_of, nara_adapters_of, part_of
from .strict import check_tensors

REQUEST = "_prepare_lora_hotswap_kwargs"
"""The attribute in which `enable_lora_hotswap` stores its arguments until the next load."""

_HAS_TO_AGREE = (
    "r", "rank_pattern", "core_type", "core_hidden_dims", "core_sharing", "rank_mask_min", "core_bins",
    "core_knots", "noise_embedding", "noise_embedding_dim", "use_dora", "lora_bias",
    "lora_dropout",
)  # fmt: skip
"""Fields that define the modules, which hotswap keeps. All else of an adapter is tensors, scales and η."""

_REMEDY = "load it without hotswap under another name, and delete the old one."


def prepare_for_hotswap(model: Any) -> None:
    """Make scales tensors, and pad the LoRAs, if `enable_lora_hotswap` was called since the last load.

    Raises:
        ValueError: a NaRA has another rank than the target, to which PEFT pads. RuntimeError: the model is compiled.
    """
    request = getattr(model, REQUEST, None)
    if request is None:
        return
    for name, config in adapters_of(model).items():
        ranks = {config.r, *(config.rank_pattern or {}).values()}
        if ranks != {request["target_rank"]} and (isinstance(config, NaraConfig) or strength_of(model, name)):
            raise ValueError(
                f"enable_lora_hotswap was given target_rank={request['target_rank']}, but '{name}', whose update "
                f"depends on λ, has rank {', '.join(map(str, sorted(ranks)))}: it is swapped at equal rank alone, so "
                "pass that as target_rank, or load without enable_lora_hotswap."
            )
    prepare_model_for_compiled_hotswap(model, **request)
    setattr(model, REQUEST, None)


def check_swappable(model: nn.Module, component: str, adapter_name: str, part: AdapterPart | None) -> None:
    """Raises ValueError if the part, None for none, cannot take the place of the adapter of that name."""
    if part is None:
        if adapter_name in adapters_of(model):
            raise ValueError(
                f"The new adapter has no part for '{component}', where '{adapter_name}' has one that would stay, so "
                f"that both would be mixed: remove it by pipe.delete_adapters('{adapter_name}'), then load without "
                "hotswap."
            )
        return
    old = nara_adapters_of(model).get(adapter_name)
    if old is None:
        raise ValueError(
            f"'{adapter_name}' of {component} is a LoRA, or not there: a NaRA can only be swapped for a NaRA; {_REMEDY}"
        )
    for field in _HAS_TO_AGREE:
        if getattr(old, field) != getattr(part.config, field):
            raise ValueError(
                f"{field} is {getattr(part.config, field)!r} in the new adapter, and {getattr(old, field)!r} in "
                f"'{adapter_name}' of {component}, whose modules hotswap keeps: {_REMEDY}"
            )
    holder: Any = holder_of(model)
    holder.complete(adapter_name, part.config)
    check_strength(model, adapter_name, part.config.strength)
    there = part_of(model, adapter_name).tensors
    if different := sorted(there.keys() ^ part.tensors.keys()):
        raise ValueError(
            f"The new adapter and '{adapter_name}' of {component} adapt different modules ('{different[0]}' is in one "
            f"of them only), which hotswap cannot change: {_REMEDY}"
        )
    check_tensors(part.tensors, there)
    if any(layer.merged for layer in layers_of(model, adapter_name).values()):
        raise ValueError(f"'{adapter_name}' of {component} is fused: call pipe.unfuse_lora() before swapping it.")


@torch.no_grad()
def swap(model: Any, adapter_name: str, part: AdapterPart) -> None:
    """Replace the adapter's tensors, scales, η and convention of λ by those of `part`, in place."""
    config, there = part.config, part_of(model, adapter_name).tensors
    holder: Any = holder_of(model)
    for key, tensor in part.tensors.items():
        there[key].copy_(tensor)
    for name, layer in layers_of(model, adapter_name).items():
        layer.use_rslora[adapter_name] = config.use_rslora
        rank = by_pattern(config.rank_pattern, name, config.r)
        _update_scaling(layer, adapter_name=adapter_name, scaling=configured_scaling(config, name, rank))
        layer.lora_alpha[adapter_name] = by_pattern(config.alpha_pattern, name, config.lora_alpha)
    cores = holder.cores[adapter_name]
    for group, core in cores.items():
        if isinstance(core, CustomCore):  # only its factory knows what it reads of the configuration
            cores[group] = rebuild_core(core, config)
        else:
            core.scale = config.core_scale
    config = holder.complete(adapter_name, config)
    holder.reconfigure(adapter_name, config)
    give_strength(model, adapter_name, config.strength)
