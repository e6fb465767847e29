"""Hotswap: replacing an adapter's weights in place, so that a compiled model is not recompiled.

After `enable_lora_hotswap(target_rank=R)` the ranks r ≤ R may differ. A layer then has A (R, d_in), B (d_out, R) and C
(R, R). An adapter of rank r fills the first r rows of A, the first r columns of B and the leading (r, r) block of C −
I; the rest is zero, so that B·C·A is the update of rank r.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from peft.utils.hotswap import _update_scaling, prepare_model_for_compiled_hotswap
from torch import Tensor, nn

from nara_diffusion.cores.custom import CustomCore, rebuild_custom_core
from nara_diffusion.tuner.config import NaraConfig
from nara_diffusion.tuner.holder.build_core import build_core, is_block_of_larger
from nara_diffusion.tuner.holder.core_holder import holder_of
from nara_diffusion.tuner.strength.conversions import warn_where_off
from nara_diffusion.tuner.strength.layers import (
    check_strength,
    default_strengths,
    give_strength,
    has_strength,
    layers_of,
)

from .completeness import check_loaded
from .format import AdapterPart
from .insertion import adapters_of, nara_adapters_of, part_of
from .validation import by_pattern, check_part, expected_tensors, rank_of

REQUEST = "_prepare_lora_hotswap_kwargs"
"""The attribute in which `enable_lora_hotswap` stores its arguments until the next load."""

_HAS_TO_AGREE = (
    "core_type",
    "core_hidden_dims",
    "core_input",
    "core_sharing",
    "rank_mask_min",
    "core_bins",
    "core_knots",
    "noise_embedding",
    "noise_embedding_dim",
    "mask_density_radius",
    "use_dora",
    "lora_bias",
    "lora_dropout",
)
"""Fields that define the modules, which hotswap keeps. All else of an adapter is tensors, scales and η."""

_REMEDY = "load it without hotswap under another name, and delete the old one."


def prepare_for_hotswap(model: Any, adapter_name: str) -> None:
    """Pad the adapters to the target rank, if `enable_lora_hotswap` was called since the last load.

    Raises:
        ValueError: an adapter's rank is above the target rank. RuntimeError: the model is compiled already.
    """
    request = getattr(model, REQUEST, None)
    if request is None:
        return
    layers = layers_of(model, adapter_name).values()
    target, own = request["target_rank"], max(layer.r[adapter_name] for layer in layers)
    if own > target:
        raise ValueError(
            f"enable_lora_hotswap was given target_rank={target}, but this adapter has rank {own}: give it the largest "
            "rank of all adapters."
        )
    check_enlargeable(model, target)
    prepare_model_for_compiled_hotswap(model, **request)
    enlarge_cores(model, target)
    setattr(model, REQUEST, None)


def check_enlargeable(model: nn.Module, target: int) -> None:
    """Raises ValueError if an adapter of the model has a C that cannot be enlarged to the rank `target`."""
    for name, config in adapters_of(model).items():
        if has_strength(model, name) and not isinstance(config, NaraConfig):
            raise ValueError(
                f"enable_lora_hotswap would make room for rank {target} in LoRA '{name}', whose strength depends on λ: "
                f"take that away before, set_strength(model, {name!r}, None), or load it last."
            )
        if isinstance(config, NaraConfig) and not is_block_of_larger(config) and config.ranks != {target}:
            raise ValueError(
                f"enable_lora_hotswap was given target_rank={target}, but adapter '{name}' has "
                f"core_type={config.core_type!r}, whose C belongs to its rank {config.r}: pass target_rank={config.r}."
            )


def enlarge_cores(model: nn.Module, rank: int) -> None:
    """Enlarge the cores of all NaRAs, and the ranks stored in their layers, after PEFT has padded A and B."""
    for name, config in nara_adapters_of(model).items():
        _enlarge(model, name, config, rank)


def _enlarge(model: nn.Module, adapter_name: str, config: NaraConfig, rank: int) -> None:
    for layer in layers_of(model, adapter_name).values():
        scaling = float(layer.scaling[adapter_name])
        layer.r[adapter_name] = len(layer.lora_A[adapter_name].weight)
        _set_alpha(layer, adapter_name, scaling)
    if not is_block_of_larger(config):
        return  # C belongs to its rank, which `check_enlargeable` saw to be this one
    holder = holder_of(model)
    assert holder is not None
    cores: Any = holder.cores[adapter_name]
    for group, core in cores.items():
        with torch.device("meta"):
            larger = build_core(config, rank)
        old = core.state_dict()
        new = {
            key: resized(old[key], like.shape, _is_squared(key, config)) for key, like in larger.state_dict().items()
        }
        larger.load_state_dict(new, assign=True)
        trainable = any(parameter.requires_grad for parameter in core.parameters())
        cores[group] = larger.train(core.training).requires_grad_(trainable)


def check_no_part_stays(held: Iterable[str], parts: Iterable[str], adapter_name: str) -> None:
    """Raises ValueError if the existing adapter is in a component (of `held`) for which the new one has no part."""
    staying = sorted(set(held) - set(parts))
    if staying:
        raise ValueError(
            f"The new adapter has no part for {', '.join(map(repr, staying))}, where '{adapter_name}' has one that "
            f"would stay, so that both would be mixed: remove it by pipe.delete_adapters('{adapter_name}'), then load "
            "without hotswap."
        )


def check_swappable(model: nn.Module, component: str, adapter_name: str, part: AdapterPart) -> None:
    """Raises ValueError if the part cannot take the place of the adapter of that name."""
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
    if not is_block_of_larger(old) and (old.r, old.rank_pattern) != (part.config.r, part.config.rank_pattern):
        raise ValueError(
            f"The new adapter has rank {part.config.r}, and '{adapter_name}' of {component} rank {old.r}, to which C "
            f"of core_type={old.core_type!r} belongs: {_REMEDY}"
        )
    check_part(model, component, part, adapter_name)
    check_strength(model, part.config, adapter_name, default_strengths(model, part.config, adapter_name))
    there = part_of(model, adapter_name).tensors
    if there.keys() != part.tensors.keys():
        different = sorted(there.keys() ^ part.tensors.keys())
        raise ValueError(
            f"The new adapter and '{adapter_name}' of {component} adapt different modules ('{different[0]}' is in one "
            f"of them only), which hotswap cannot change: {_REMEDY}"
        )
    fixed = not is_block_of_larger(old)
    for key, tensor in part.tensors.items():
        if fixed and tensor.shape != there[key].shape:
            raise ValueError(
                f"'{key}' of {component} has shape {tuple(tensor.shape)}, but '{adapter_name}' has "
                f"{tuple(there[key].shape)}, to which C of core_type={old.core_type!r} belongs: {_REMEDY}"
            )
        if any(new > room for new, room in zip(tensor.shape, there[key].shape, strict=True)):
            raise ValueError(
                f"'{key}' of {component} has shape {tuple(tensor.shape)}, but '{adapter_name}' has room for "
                f"{tuple(there[key].shape)}: call pipe.enable_lora_hotswap(target_rank=…) with the largest rank before "
                "the first adapter is loaded."
            )
    if any(layer.merged for layer in layers_of(model, adapter_name).values()):
        raise ValueError(f"'{adapter_name}' of {component} is fused: call pipe.unfuse_lora() before swapping it.")


@torch.no_grad()
def swap(model: Any, adapter_name: str, part: AdapterPart) -> None:
    """Replace the adapter's tensors, scales, η and convention of λ by those of `part`, in place."""
    config = part.config
    there = part_of(model, adapter_name).tensors
    for key, tensor in part.tensors.items():
        there[key].copy_(resized(tensor, there[key].shape, _is_squared(key, config)))
    for name, layer in layers_of(model, adapter_name).items():
        layer.use_rslora[adapter_name] = config.use_rslora
        rank = rank_of(config, name)
        alpha = by_pattern(config.alpha_pattern, name, config.lora_alpha)
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        _update_scaling(layer, adapter_name=adapter_name, scaling=scaling)
        _set_alpha(layer, adapter_name, scaling)
    holder = holder_of(model)
    assert holder is not None
    _follow(holder.cores[adapter_name], config)
    stated = config.noise_convention is not None
    model.peft_config[adapter_name] = config = holder.conventions.completed(adapter_name, config)
    holder.configure(adapter_name, config, stated)
    give_strength(model, config, adapter_name, default_strengths(model, config, adapter_name))
    held = trimmed(model, part_of(model, adapter_name)).tensors
    check_loaded(model, adapter_name, part.tensors, "the adapter", held)
    warn_where_off(model, adapter_name)


def _follow(cores: Any, config: NaraConfig) -> None:
    """Apply those fields of `config` to the cores that are not in their tensors."""
    for group, core in cores.items():
        if isinstance(core, CustomCore):  # only its factory knows what it reads of the configuration
            cores[group] = rebuild_custom_core(core, config)
        else:
            core.scale = config.core_scale


def trimmed(model: nn.Module, part: AdapterPart) -> AdapterPart:
    """`part` of `model` at its own rank, without the padding of `enable_lora_hotswap`."""
    expected = expected_tensors(model, part)
    own = {key: resized(t, expected[key].shape, _is_squared(key, part.config)) for key, t in part.tensors.items()}
    return AdapterPart(part.config, own)


def _set_alpha(layer: Any, adapter_name: str, scaling: float) -> None:
    """Set α so that α / r, which `set_adapters` multiplies, is `scaling` at the padded rank r."""
    rank = layer.r[adapter_name]
    layer.lora_alpha[adapter_name] = scaling * (math.sqrt(rank) if layer.use_rslora[adapter_name] else rank)


def resized(tensor: Tensor, shape: torch.Size, squared: bool) -> Tensor:
    """The leading block of `tensor` in a tensor of `shape` that is zero elsewhere. `squared`: axis 0 counts r × r."""
    if tensor.shape == shape:
        return tensor
    if squared:
        old, new = math.isqrt(tensor.shape[0]), math.isqrt(shape[0])
        tensor, target = tensor.view(old, old, *tensor.shape[1:]), (new, new, *shape[1:])
    else:
        target = tuple(shape)
    block = tuple(slice(0, min(sizes)) for sizes in zip(tensor.shape, target, strict=True))
    result = tensor.new_zeros(target)
    result[block] = tensor[block]
    return result.reshape(shape)


def _is_squared(key: str, config: NaraConfig) -> bool:
    """Whether the tensor of a core belongs to F's last layer, whose outputs are the entries of C."""
    *_, layers, number, kind = ("", "", *key.split("."))
    return (layers, number) == ("layers", str(len(config.core_hidden_dims))) and kind in ("weight", "bias")
