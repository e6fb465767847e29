"""One component of a pipeline: insert an adapter, and remove it."""

from __future__ import annotations

import warnings
from typing import Any

from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.layers.dispatch import factor_dtype
from nara_diffusion.tuner.activation import tuner_layers
from nara_diffusion.tuner.holder.core_holder import HOLDER_NAME
from nara_diffusion.tuner.injection import LOADED_FLAG, drop_idle_holder
from nara_diffusion.tuner.strength.conversions import warn_where_off

from .completeness import check_loaded, held_tensors
from .format import AdapterPart, is_core_key


def adapters_of(model: nn.Module) -> dict[str, Any]:
    """{adapter name: configuration} of all adapters."""
    return getattr(model, "peft_config", None) or {}


def nara_adapters_of(model: nn.Module) -> dict[str, NaraConfig]:
    """{adapter name: configuration} of the NaRA adapters."""
    return {name: config for name, config in adapters_of(model).items() if isinstance(config, NaraConfig)}


def insert(model: nn.Module, adapter_name: str, part: AdapterPart, low_cpu_mem_usage: bool) -> None:
    """Add an adapter, after `check_part`, inside `rollback_on_error`. It is active, also if the others were disabled.

    A, B and magnitudes take the dtype of their base layer, like those of a LoRA, or float32 if layerwise casting stores
    the base as float8; the core stays in float32. Its dropout is at work only if `model` is in training mode.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # several are meant
        inject_adapter_in_model(part.config, model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    for module, tensors in _by_module(part.tensors).items():
        if module:
            _fill_layer(model.get_submodule(module), adapter_name, tensors)
        else:
            _fill_core(getattr(model, HOLDER_NAME).cores[adapter_name], tensors)
    check_loaded(model, adapter_name, part.tensors, "the adapter")
    for layer in tuner_layers(model):
        layer._disable_adapters = False
        if isinstance(layer, LoraLayer) and adapter_name in layer.lora_dropout:  # a new module is in training mode
            layer.lora_dropout[adapter_name].train(model.training)
    setattr(model, LOADED_FLAG, True)
    warn_where_off(model, adapter_name)


def _by_module(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{module: {name in the module: tensor}}; those of the core have the module name ""."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if is_core_key(key):
            found.setdefault("", {})[key.removeprefix(f"{HOLDER_NAME}.")] = tensor
        else:
            module, _, rest = key.partition(".lora_")
            found.setdefault(module, {})[f"lora_{rest}"] = tensor
    return found


def _fill_layer(layer: Any, adapter_name: str, tensors: dict[str, Tensor]) -> None:
    """Set the tensors of an adapted layer. (PEFT's own function walks four times over the whole model.)"""
    device, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
    dtype = factor_dtype(dtype)
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        owner = getattr(layer, kind)
        if isinstance(owner, nn.ParameterDict):  # of an embedding
            name = adapter_name
        else:
            owner, name = owner[adapter_name], name or "weight"  # PEFT leaves it out of the names of magnitudes
        requires_grad = getattr(owner, name).requires_grad
        setattr(owner, name, nn.Parameter(tensor.to(device, dtype), requires_grad=requires_grad))


def _fill_core(cores: Any, tensors: dict[str, Tensor]) -> None:
    device = next((t.device for t in (*cores.parameters(), *cores.buffers()) if not t.is_meta), None)
    trainable = [parameter.requires_grad for parameter in cores.parameters()]
    cores.load_state_dict(tensors, assign=True)
    cores.to(device)
    for parameter, requires_grad in zip(cores.parameters(), trainable, strict=True):
        parameter.requires_grad = requires_grad


def part_of(model: nn.Module, adapter_name: str) -> AdapterPart:
    """The adapter's configuration and tensors, as saved in a file."""
    return AdapterPart(nara_adapters_of(model)[adapter_name], held_tensors(model, adapter_name))


def remove(model: nn.Module, adapter_names: list[str]) -> None:
    """Remove adapters. The others stay as they are, active or not; without any, the base model is restored."""
    layers = tuner_layers(model)
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = [[name for name in layer.active_adapters if name not in adapter_names] for layer in layers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
        for layer, names in zip(layers, active, strict=True):
            for name in adapter_names:
                layer.delete_adapter(name)
            layer._active_adapter = names
    for name in adapter_names:
        adapters_of(model).pop(name, None)
    drop_idle_holder(model)
    unwrap(model)
    for parameter, requires_grad in trainable:
        parameter.requires_grad = requires_grad


def unwrap(model: nn.Module) -> None:
    """Restore base layers that have no adapter left, and, without any adapter, the attributes of the model."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, LoraLayer) and not child.r:
                setattr(parent, name, child.get_base_layer())
    if not adapters_of(model):
        for name in ("peft_config", LOADED_FLAG):
            model.__dict__.pop(name, None)
