"""Replace an adapter's weights in place (hotswap), so that a compiled model is not recompiled.

The new adapter must have the ranks of the old adapter, since C(λ) is r × r. To store the scales as
tensors, call `enable_lora_hotswap(target_rank=r)` with the adapter's own rank r. An adapter with
another lora_alpha then causes no recompilation either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.cores.custom import CustomCore, rebuild_core
from nara_diffusion.strict import check_tensors
from nara_diffusion.tuner.holder import CoreHolder, holder_of
from nara_diffusion.tuner.strength import check_strength, give_strength, layers_of, strength_of
from nara_diffusion.tuner.twins import decoder_name, with_encoder_layers
from nara_diffusion.utils.wording import listed

from .adapter_part import AdapterPart, by_pattern, configured_scaling
from .insertion import adapters_of, nara_adapters_of, part_of

REQUEST = "_prepare_lora_hotswap_kwargs"
"""The attribute that stores the arguments of `enable_lora_hotswap` until the next load."""
_HAS_TO_AGREE = (
    "r",
    "rank_pattern",
    "core_type",
    "core_hidden_dims",
    "core_sharing",
    "rank_mask_min",
    "core_bins",
    "core_knots",
    "noise_embedding",
    "noise_embedding_dim",
    "use_dora",
    "lora_bias",
    "lora_dropout",
)
"""Fields that define modules, which hotswap keeps. The rest is tensors, scales and η."""
_REMEDY = "load it without hotswap under another name, and delete the old one."


def prepare_for_hotswap(model: nn.Module, request: Mapping[str, Any]) -> None:
    """Turn scales into tensors and pad LoRAs, as requested with `enable_lora_hotswap`.

    Raises:
        ValueError: the rank of a NaRA differs from the target rank, to which PEFT would pad it.
        RuntimeError: the model is compiled.
    """
    target = request["target_rank"]
    for name, config in adapters_of(model).items():
        ranks = {config.r, *(config.rank_pattern or {}).values()}
        depends_on_noise = isinstance(config, NaraConfig) or strength_of(model, name) is not None
        if depends_on_noise and ranks != {target}:
            found = ", ".join(map(str, sorted(ranks)))
            raise ValueError(
                f"enable_lora_hotswap was given target_rank={target}, but '{name}' depends on λ and has "
                f"rank {found}: it can be swapped only at equal rank, so pass that as target_rank, or "
                "load without enable_lora_hotswap."
            )
    prepare_model_for_compiled_hotswap(model, **request)
    setattr(model, REQUEST, None)


def check_swappable(
    model: nn.Module, component: str, adapter_name: str, part: AdapterPart | None
) -> None:
    """Raise ValueError if a part cannot replace the adapter with that name.

    `part` is the new adapter's part for this component, or None if there is none.
    """
    if part is None:
        if adapter_name in adapters_of(model):
            raise ValueError(
                f"The new adapter has no part for '{component}', but '{adapter_name}' has; "
                "hot-swapping would mix the two: remove the old one with "
                f"pipe.delete_adapters('{adapter_name}'), then load without hotswap."
            )
        return
    old = nara_adapters_of(model).get(adapter_name)
    if old is None:
        raise ValueError(
            f"'{adapter_name}' of {component} is a LoRA, or does not exist: a NaRA can only be swapped for "
            f"a NaRA; {_REMEDY}"
        )
    for field in _HAS_TO_AGREE:
        there, given = getattr(old, field), getattr(part.config, field)
        if there != given:
            raise ValueError(
                f"{field} is {given!r} in the new adapter but {there!r} in '{adapter_name}' of "
                f"{component}, and hotswap keeps the modules: {_REMEDY}"
            )
    _holder(model).finder.with_convention(adapter_name, part.config)
    check_strength(model, adapter_name, part.config.strength)
    _check_encoder_layers(model, adapter_name, part)
    check_tensors(part.tensors, part_of(model, adapter_name).tensors)


def _check_encoder_layers(model: nn.Module, adapter_name: str, part: AdapterPart) -> None:
    """Raise ValueError if only one of the adapters is also in a DiffusionGemma's encoder.

    The files of both have the same tensors, since encoder layers share those of the decoder.
    """
    given = with_encoder_layers(model, part.config, part.modules)
    there = layers_of(model, adapter_name)
    different = [name for name in given.keys() ^ there.keys() if decoder_name(model, name)]
    if different:
        raise ValueError(
            f"{listed(sorted(different))} is adapted by the new adapter or by '{adapter_name}', but not "
            f"by both, and hotswap keeps the modules: {_REMEDY}"
        )


def prepare_swap(model: nn.Module, adapter_name: str, part: AdapterPart) -> Callable[[], None]:
    """Compute the new adapter's values, and return a function that writes them in place.

    All errors are raised here, before anything is written.
    """
    config = part.config
    there = part_of(model, adapter_name).tensors
    holder = _holder(model)
    cores: Any = holder.cores[adapter_name]
    layers = layers_of(model, adapter_name)
    scales = {}
    for name in layers:
        rank = by_pattern(config.rank_pattern, name, config.r)
        scales[name] = configured_scaling(config, name, rank)
    rebuilt = {}
    for group, core in cores.items():
        if isinstance(core, CustomCore):  # only its factory knows which fields it reads
            rebuilt[group] = rebuild_core(core, config)
    completed = holder.finder.with_convention(adapter_name, config)

    @torch.no_grad()
    def write() -> None:
        for name, layer in layers.items():
            layer.use_rslora[adapter_name] = config.use_rslora
            scaling = layer.scaling[adapter_name]
            if isinstance(scaling, torch.Tensor):  # after enable_lora_hotswap
                scaling.fill_(scales[name])
            else:
                layer.scaling[adapter_name] = scales[name]
            alpha = by_pattern(config.alpha_pattern, name, config.lora_alpha)
            layer.lora_alpha[adapter_name] = alpha
        for group, core in cores.items():
            if group in rebuilt:
                cores[group] = rebuilt[group]
            else:
                core.scale = config.core_scale
        holder.reconfigure(adapter_name, completed)
        give_strength(model, adapter_name, completed.strength)
        for key, tensor in part.tensors.items():
            there[key].copy_(tensor)

    return write


def _holder(model: nn.Module) -> CoreHolder:
    """Return the holder of a model that has a NaRA."""
    holder = holder_of(model)
    assert holder is not None
    return holder
