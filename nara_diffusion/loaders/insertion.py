"""One component of a pipeline: insert an adapter, and remove it."""

from __future__ import annotations

import warnings
from typing import Any

from peft import inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from nara_diffusion.config import NaraConfig, changes_base
from nara_diffusion.cores.registry import needs_noise
from nara_diffusion.layers.dispatch import factor_dtype
from nara_diffusion.tuner.holder import drop_idle_holder

from .file import AdapterPart
from .strict import held_tensors, is_core_key

TEXT_ENCODER = "text_encoder"
"""The beginning of the names of the text encoders' components."""


LOADED_FLAG = "_hf_peft_config_loaded"
"""The attribute by which Diffusers and Transformers know that a model has adapters."""


def tuner_layers(model: nn.Module) -> list[Any]:
    """PEFT's layers of all kinds."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def adapters_of(model: nn.Module) -> dict[str, Any]:
    """{adapter name: configuration} of all adapters."""
    return getattr(model, "peft_config", None) or {}


def nara_adapters_of(model: nn.Module) -> dict[str, NaraConfig]:
    """{adapter name: configuration} of the NaRA adapters."""
    return {name: config for name, config in adapters_of(model).items() if isinstance(config, NaraConfig)}


def check_storable(config: NaraConfig, component: str) -> None:
    """Raises ValueError if the adapter cannot run in `component`, or if unloading it could not restore the base."""
    if component.startswith(TEXT_ENCODER) and needs_noise(config):
        raise ValueError(
            f"The adapter of {component} has core_type={config.core_type!r}, but text encoders run before there is a "
            'λ: use NaraConfig(core_type="identity", …) there.'
        )
    fields = {"bias": "none", "modules_to_save": None, "trainable_token_indices": None, "target_parameters": None}
    wrong = [name for name, default in fields.items() if (getattr(config, name, None) or default) != default]
    if changes_base(config.init_lora_weights):
        wrong.append("init_lora_weights")
    if wrong:
        raise ValueError(
            f"The adapter of {component} has {wrong[0]}={getattr(config, wrong[0])!r}, which changes the base model "
            "itself, so that unloading could not give it back: train without it, or use peft.PeftModel's "
            "save_pretrained and from_pretrained on the component."
        )


def insert(model: nn.Module, adapter_name: str, part: AdapterPart, low_cpu_mem_usage: bool = True) -> None:
    """Add an adapter, inside `restored_on_error`. It is active, also if the others were disabled.

    A, B and magnitudes take the dtype of their base layer, like those of a LoRA, or float32 if layerwise casting stores
    the base as float8; the core stays in float32. Its dropout is at work only if `model` is in training mode.

    Raises:
        ValueError: the tensors are not those that the configuration needs in this model: see `strict.check_tensors`.
    """
    if any(parameter.dtype.is_floating_point and parameter.dtype.itemsize == 1 for parameter in model.parameters()):
        low_cpu_mem_usage = False  # by which PEFT converts A and B to the dtype of the base layer, float8
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # several are meant
        warnings.filterwarnings("ignore", message="The following .* keys did not match")  # the strict check says more
        inject_adapter_in_model(part.config, model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    tensors = _in_dtypes_of_layers(model, part.tensors)
    set_peft_model_state_dict(model, tensors, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    for layer in tuner_layers(model):
        layer._disable_adapters = False
        if isinstance(layer, LoraLayer) and adapter_name in layer.lora_dropout:  # a new module is in training mode
            layer.lora_dropout[adapter_name].train(model.training)
    setattr(model, LOADED_FLAG, True)


def _in_dtypes_of_layers(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A, B and magnitudes in the dtypes for factors of their layers; all else as it is, for the strict check."""
    layers: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    }
    found = dict(tensors)
    for key, tensor in tensors.items():
        layer = layers.get(key.partition(".lora_")[0])
        if layer is not None and not is_core_key(key) and tensor.is_floating_point():
            weight = getattr(layer.get_base_layer(), "weight", None)
            dtype = factor_dtype(getattr(weight, "dtype", None))
            found[key] = tensor if dtype is None else tensor.to(dtype)
    return found


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
