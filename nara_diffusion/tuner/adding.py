"""Check an adapter that is added, make its cores, and restore the model after an error."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.cores.core_set import HOLDER_NAME, CoreSet, make_cores, ranks_by_group
from nara_diffusion.cores.registry import BUILT_IN
from nara_diffusion.layers.offloading import offloading_hooks


def checked_config(model: nn.Module, adapter_name: str, config: object) -> NaraConfig:
    """Return the configuration of an adapter that can be added to `model`.

    Raises:
        ValueError: `config` isn't a `NaraConfig`, or `model`'s layers are offloaded one by one.
    """
    if not isinstance(config, NaraConfig):
        raise ValueError(
            f"Adapter '{adapter_name}' has a {type(config).__name__}: NaraModel needs a NaraConfig."
        )
    if is_dispatched_by_layers(model) and not hasattr(model, "hf_device_map"):
        raise ValueError(
            f"{type(model).__name__} is offloaded layer by layer, so a new adapter would have no values: load "
            "it by pipe.load_nara_weights(), or add it before enable_sequential_cpu_offload()."
        )
    return config


def is_dispatched_by_layers(model: nn.Module) -> bool:
    """Return True if accelerate offloads the layers of `model` one by one."""
    hooked = [module for module in model.modules() if "_hf_hook" in vars(module)]
    return any(map(offloading_hooks, hooked))


def adapters_are_off(model: nn.Module) -> bool:
    """Return whether `model` has adapted layers and the adapters are disabled in all of them."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return bool(layers) and all(layer.disable_adapters for layer in layers)


@contextmanager
def restored_on_error(*roots: nn.Module) -> Iterator[None]:
    """Restore the `roots` after an error inside the context.

    This restores modules, attributes, parameters and what is trainable. Containers are restored in
    place, since hook handles refer to them. Tensor values that were changed in place are not
    restored. PEFT's initialisations that change the base do not need this: they set new tensors.
    """
    modules = {module for root in roots for module in root.modules()}
    parameters = {parameter for module in modules for parameter in module.parameters(recurse=False)}
    tensors = [(parameter, parameter.data, parameter.requires_grad) for parameter in parameters]
    attributes = [(vars(module), dict(vars(module))) for module in modules]
    containers = [
        (value, value.copy())
        for _, values in attributes
        for value in values.values()
        if type(value) in (dict, list, set, OrderedDict)
    ]
    try:
        yield
    except BaseException:
        for present, former in (*attributes, *containers):
            present.clear()
            if isinstance(present, list):
                present.extend(former)
            else:
                present.update(former)
        for parameter, data, requires_grad in tensors:
            parameter.data = data
            parameter.requires_grad = requires_grad
        raise


@contextmanager
def without_holder(root: nn.Module) -> Iterator[None]:
    """Hide the cores from PEFT inside the context, since `target_modules` may match them."""
    holder = root._modules.pop(HOLDER_NAME, None)
    try:
        yield
    finally:
        if holder is not None:
            root._modules[HOLDER_NAME] = holder


def cores_for(
    config: NaraConfig,
    adapter_name: str,
    layers: dict[str, LoraLayer],
    low_cpu_mem_usage: bool,
    is_dispatched: bool,
) -> CoreSet:
    """Return the cores of an adapter, on the device of its layers.

    Args:
        layers: the adapted layers, by name.
        low_cpu_mem_usage: True if a file will replace the values, so they may be on "meta".
        is_dispatched: True if accelerate offloads the layers one by one.
    """
    # the ranks of the layers follow rank_pattern
    ranks = ranks_by_group(config, {name: layer.r[adapter_name] for name, layer in layers.items()})
    # a custom core may have values that are not saved to a file
    on_meta = low_cpu_mem_usage and config.core_type in BUILT_IN
    with torch.device("meta") if on_meta else nullcontext():
        cores = make_cores(config, ranks)
    if any(parameter.is_meta for parameter in cores.parameters()):
        return cores
    parameters = [p for layer in layers.values() for p in cast(nn.Module, layer).parameters()]
    devices = [parameter.device for parameter in parameters if not parameter.is_meta]
    if devices:
        return cores.to(devices[0])
    will_be_loaded = low_cpu_mem_usage or is_dispatched or not parameters
    return cores.to("cpu" if will_be_loaded else "meta")
