"""Insert adapters into the models of a pipeline, replace their weights in place, and remove them.

Replacing weights in place (hotswap) recompiles no compiled model. The new adapter must have the
ranks of the old one, since C(λ) is r × r. To store the scales as tensors, call
`enable_lora_hotswap(target_rank=r)` with the adapter's own rank r. An adapter with another
lora_alpha then causes no recompilation either.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from peft import inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.cores.registry import CustomCore, rebuild_core
from nara_diffusion.layers.offloading import groups_of, is_float8
from nara_diffusion.strict import adapter_tensors, check_finite, check_tensors
from nara_diffusion.tuner.holder import drop_idle_holder, holder_of
from nara_diffusion.tuner.strength import check_strength, give_strength, layers_of, strength_of
from nara_diffusion.tuner.twins import decoder_name, with_encoder_layers
from nara_diffusion.utils.wording import listed

from .adapter_part import AdapterPart, by_pattern, configured_scaling
from .components import adapters_of, nara_adapters_of, part_of, tuner_layers

logger = logging.getLogger(__name__)

LOADED_FLAG = "_hf_peft_config_loaded"
"""The attribute that tells Diffusers and Transformers that a model has adapters."""


@contextmanager
def offloading_suspended(pipe: Any) -> Iterator[None]:
    """Remove accelerate's offloading hooks from `pipe`, and restore them on exit, as for a LoRA.

    Raises:
        ValueError: weights are on disk because of group offloading.
    """
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    for name, part in parts.items():
        groups = [group for module in part.modules() for group in groups_of(module)]
        if any(group.offload_to_disk_path is not None for group in groups):
            raise ValueError(
                f"Group offloading keeps the weights of {name} on disk, in files that are not updated when "
                "adapters change. Load, save or unload adapters before you call "
                "enable_group_offload(…)."
            )
    model, sequential, grouped = _func_optionally_disable_offloading(pipe)
    device = {"device": pipe._offload_device} if hasattr(pipe, "_offload_device") else {}
    try:
        yield
    finally:
        if model:
            pipe.enable_model_cpu_offload(**device)
        elif sequential:
            pipe.enable_sequential_cpu_offload(**device)
        elif grouped:
            for part in parts.values():
                _maybe_remove_and_reapply_group_offloading(part)


def insert(
    model: nn.Module, adapter_name: str, part: AdapterPart, low_cpu_mem_usage: bool = True
) -> None:
    """Add an adapter and activate it, even if the other adapters were disabled.

    Call this inside `restored_on_error`. As in a LoRA, A, B and magnitudes take the dtype of their
    base layer. They take float32 if layerwise casting stores the base as float8. The core stays in
    float32. Dropout is active only if `model` is in training mode.

    Raises:
        ValueError: the tensors are not those that the configuration needs in this model (see
            `strict.check_tensors`).
    """
    if any(is_float8(parameter.dtype) for parameter in model.parameters()):
        low_cpu_mem_usage = False  # PEFT would convert A and B to the base layer's float8
    layers = tuner_layers(model)
    if layers and all(layer.disable_adapters for layer in layers):
        logger.warning(
            "The adapters of %s were disabled by disable_lora(), and loading '%s' enables them again. "
            "Choose the active ones with pipe.set_adapters.",
            type(model).__name__,
            adapter_name,
        )
    for layer in layers:
        layer._disable_adapters = False
    options = {"adapter_name": adapter_name, "low_cpu_mem_usage": low_cpu_mem_usage}
    with warnings.catch_warnings():
        # several adapters are intended, and the strict check reports more about keys
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        warnings.filterwarnings("ignore", message="The following .* keys did not match")
        inject_adapter_in_model(part.config, model, **options)
    set_peft_model_state_dict(model, part.tensors, **options)
    for key, tensor in adapter_tensors(model, adapter_name).items():
        if tensor.dtype != part.tensors[key].dtype and not tensor.is_meta:
            check_finite(key, tensor, tensor.dtype)  # in the dtype that PEFT converted to
    for layer in tuner_layers(model):
        if isinstance(layer, LoraLayer) and adapter_name in layer.lora_dropout:
            layer.lora_dropout[adapter_name].train(model.training)
    setattr(model, LOADED_FLAG, True)


def remove(model: nn.Module, adapter_names: list[str]) -> None:
    """Remove adapters without changing which others are active; after the last, restore the base."""
    for layer in tuner_layers(model):
        # PEFT would activate another adapter instead of the deleted one
        layer._active_adapter = [
            name for name in layer.active_adapters if name not in adapter_names
        ]
        for name in adapter_names:
            layer.delete_adapter(name)
    for name in adapter_names:
        adapters_of(model).pop(name, None)
    drop_idle_holder(model)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, LoraLayer) and not child.r:
                setattr(parent, name, child.get_base_layer())
    if not adapters_of(model):
        for name in ("peft_config", LOADED_FLAG):
            model.__dict__.pop(name, None)


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
    # only the factory of a custom core knows which fields it reads
    rebuilt = {
        group: rebuild_core(core, config)
        for group, core in cores.items()
        if isinstance(core, CustomCore)
    }
    completed = holder.finder.with_convention(adapter_name, config)

    @torch.no_grad()
    def write() -> None:
        for name, layer in layers_of(model, adapter_name).items():
            layer.lora_alpha[adapter_name] = by_pattern(
                config.alpha_pattern, name, config.lora_alpha
            )
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
