"""Insert adapters into the models of a pipeline, and remove them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from peft import inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from nara_diffusion.layers.offloading import groups_of, is_float8
from nara_diffusion.strict import adapter_tensors, check_finite
from nara_diffusion.tuner.holder import drop_idle_holder

from .adapter_part import AdapterPart
from .components import adapters_of, tuner_layers

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
        hooked = [module for module in part.modules() if "_diffusers_hook" in vars(module)]
        groups = [group for module in hooked for group in groups_of(module)]
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
