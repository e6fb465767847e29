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
from nara_diffusion.tuner.holder import holder_of
from nara_diffusion.tuner.strength import check_strength, give_strength, layers_of, strength_of
from nara_diffusion.tuner.twins import decoder_name, with_encoder_layers
from nara_diffusion.utils.wording import listed

from .adapter_part import AdapterPart, by_pattern, configured_scaling
from .components import adapters_of, nara_adapters_of, part_of

REQUEST = "_prepare_lora_hotswap_kwargs"
"""The attribute that stores the arguments of `enable_lora_hotswap` until the next load."""
_HAS_TO_AGREE = (
    "r",
    "rank_pattern",
    "core_type",
    "core_hidden_dims",
    "core_sharing",
    "rank_mask_min",
    "rank_mask_exponent",
    "rank_mask_step",
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
            raise ValueError(
                f"enable_lora_hotswap was called with target_rank={target}, but '{name}' depends on λ and has rank "
                f"{', '.join(map(str, sorted(ranks)))}. Such an adapter can be swapped only at equal rank: pass that "
                "rank as target_rank, or load without enable_lora_hotswap."
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
                f"The new adapter has no part for '{component}', but '{adapter_name}' has, so hotswap would mix the "
                f"two. Remove the old one with pipe.delete_adapters('{adapter_name}'), then load without hotswap."
            )
        return
    old = nara_adapters_of(model).get(adapter_name)
    if old is None:
        raise ValueError(
            f"'{adapter_name}' of {component} is a LoRA, or does not exist, and a NaRA can only replace a NaRA: "
            f"{_REMEDY}"
        )
    for field in _HAS_TO_AGREE:
        old_value, new_value = getattr(old, field), getattr(part.config, field)
        if old_value != new_value:
            raise ValueError(
                f"{field} is {new_value!r} in the new adapter but {old_value!r} in '{adapter_name}' of "
                f"{component}, and hotswap keeps the modules: {_REMEDY}"
            )
    check_strength(model, adapter_name, part.config.strength)
    # the tensors don't show whether a DiffusionGemma's encoder layers, which share them, are adapted
    modules = with_encoder_layers(model, part.config, part.modules)
    differing = modules.keys() ^ layers_of(model, adapter_name).keys()
    in_encoder = [name for name in sorted(differing) if decoder_name(model, name)]
    if in_encoder:
        raise ValueError(
            f"{listed(in_encoder)} is adapted by the new adapter or by '{adapter_name}', but not by "
            f"both, and hotswap keeps the modules: {_REMEDY}"
        )
    check_tensors(part.tensors, part_of(model, adapter_name).tensors)


def prepare_swap(model: nn.Module, adapter_name: str, part: AdapterPart) -> Callable[[], None]:
    """Compute the new adapter's values, and return a function that writes them in place.

    All errors are raised here, before anything is written.
    """
    config = part.config
    present = part_of(model, adapter_name).tensors
    holder = holder_of(model)
    assert holder is not None
    cores: Any = holder.cores[adapter_name]
    layers = layers_of(model, adapter_name)
    # only the factory of a custom core knows which fields it reads
    rebuilt = {
        group: rebuild_core(core, config)
        for group, core in cores.items()
        if isinstance(core, CustomCore)
    }
    completed = holder.finder.with_convention(adapter_name, config)

    @torch.no_grad()
    def write() -> None:
        for name, layer in layers.items():
            alpha = by_pattern(config.alpha_pattern, name, config.lora_alpha)
            layer.lora_alpha[adapter_name] = alpha
            layer.use_rslora[adapter_name] = config.use_rslora
            scale = configured_scaling(config, name, layer.r[adapter_name])
            if isinstance(layer.scaling[adapter_name], torch.Tensor):  # after enable_lora_hotswap
                layer.scaling[adapter_name].fill_(scale)
            else:
                layer.scaling[adapter_name] = scale
        for core in cores.values():
            core.scale = config.core_scale
        cores.update(rebuilt)
        holder.reconfigure(adapter_name, completed)
        give_strength(model, adapter_name, completed.strength)
        for key, tensor in part.tensors.items():
            present[key].copy_(tensor)

    return write
