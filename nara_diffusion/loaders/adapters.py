"""One component of a pipeline: an adapter put in, taken out, or, if putting it in fails, taken back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.injection import drop_idle_holder

from .format import AdapterPart

_LOADED_FLAG = "_hf_peft_config_loaded"
"""By this Diffusers and Transformers know whether a model has adapters."""


def adapters_of(model: nn.Module) -> dict[str, Any]:
    """Adapter name → configuration, of whatever type."""
    return getattr(model, "peft_config", None) or {}


def nara_adapters_of(model: nn.Module) -> dict[str, NaraConfig]:
    """The same, of NaRA adapters alone."""
    return {name: config for name, config in adapters_of(model).items() if isinstance(config, NaraConfig)}


def put_in(model: nn.Module, adapter_name: str, part: AdapterPart, low_cpu_mem_usage: bool) -> None:
    """Add an adapter; if that fails, the model is as it was.

    A, B and magnitudes take the dtype of their base layer, as those of a LoRA do; the core stays in float32.
    """
    with _taken_back_on_error(model, adapter_name), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # several are meant
        inject_adapter_in_model(part.config, model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        set_peft_model_state_dict(model, part.tensors, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        if not low_cpu_mem_usage:
            for layer in tuner_layers(model):
                layer._move_adapter_to_device_of_base_layer(adapter_name)
        setattr(model, _LOADED_FLAG, True)


def part_of(model: nn.Module, adapter_name: str) -> AdapterPart:
    """The adapter as a file holds it."""
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return AdapterPart(nara_adapters_of(model)[adapter_name], tensors)


def take_out(model: nn.Module, adapter_names: list[str]) -> None:
    """Remove adapters. What else is active stays so; after the last one the model is the base again."""
    active = {id(layer): [n for n in layer.active_adapters if n not in adapter_names] for layer in tuner_layers(model)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
        for layer in tuner_layers(model):
            for name in adapter_names:
                layer.delete_adapter(name)
            layer.set_adapter(active[id(layer)])
    for name in adapter_names:
        adapters_of(model).pop(name, None)
    drop_idle_holder(model)
    if not adapters_of(model):
        unwrap(model)


def unwrap(model: nn.Module) -> None:
    """Put the base layers back where adapted ones stood, and forget that there were adapters."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, BaseTunerLayer) and hasattr(child, "base_layer"):
                setattr(parent, name, child.get_base_layer())
    for name in ("peft_config", _LOADED_FLAG):
        model.__dict__.pop(name, None)


def tuner_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def _taken_back_on_error(model: nn.Module, adapter_name: str) -> Iterator[None]:
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    states = [(layer, list(layer.active_adapters)) for layer in tuner_layers(model)]
    flag = model.__dict__.get(_LOADED_FLAG)
    try:
        yield
    except BaseException:
        take_out(model, [adapter_name])
        for layer, active in states:
            layer._active_adapter = active
        for parameter, requires_grad in trainable:
            parameter.requires_grad = requires_grad
        if flag is not None:
            setattr(model, _LOADED_FLAG, flag)
        raise
