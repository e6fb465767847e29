"""Components of a pipeline: insert an adapter, remove it, and suspend offloading meanwhile."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from peft import PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from nara_diffusion.config import NaraConfig, changes_base
from nara_diffusion.cores.registry import needs_noise
from nara_diffusion.layers.dispatch import factor_dtype
from nara_diffusion.layers.offloading import groups_of
from nara_diffusion.tuner.holder import drop_idle_holder

from .file import AdapterPart
from .strict import held_tensors, is_core_key

logger = logging.getLogger(__name__)

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


def part_of(model: nn.Module, adapter_name: str) -> AdapterPart:
    """The adapter's configuration and tensors, as saved in a file."""
    return AdapterPart(nara_adapters_of(model)[adapter_name], held_tensors(model, adapter_name))


def unwrapped(model: nn.Module) -> nn.Module:
    """The base model, adapters included, of a PeftModel; any other model as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


# ---------------------------------------------------------------------- refused


def check_not_wrapped(model: nn.Module, component: str, method: str) -> None:
    """Raises ValueError if `model`, the pipeline's `component`, is a PeftModel, for which `method` does not work."""
    if isinstance(model, PeftModel):
        raise ValueError(
            f"{component} is a PeftModel, whose adapters pipe.{method} cannot change. Put its base model, adapters "
            f"included, into the pipeline first, pipe.{component} = pipe.{component}.get_base_model(), or use its own "
            "methods (load_adapter, set_adapter, delete_adapter, unload)."
        )


def check_storable(config: NaraConfig, component: str) -> None:
    """Raises ValueError if the adapter cannot run in `component`, or if unloading it could not restore the base."""
    if component.startswith(TEXT_ENCODER) and needs_noise(config):
        raise ValueError(
            f"The adapter of {component} has core_type={config.core_type!r}, but text encoders run before there is a "
            'λ: use NaraConfig(core_type="identity", …) there.'
        )
    fields = {"bias": "none", "modules_to_save": None, "trainable_token_indices": None, "target_parameters": None}
    wrong = [name for name, default in fields.items() if (getattr(config, name, None) or default) != default]
    wrong += ["init_lora_weights"] if changes_base(config.init_lora_weights) else []
    if wrong:
        raise ValueError(
            f"The adapter of {component} has {wrong[0]}={getattr(config, wrong[0])!r}, which changes the base model "
            "itself, so that unloading could not give it back: train without it, or use peft.PeftModel's "
            "save_pretrained and from_pretrained on the component."
        )


# ---------------------------------------------------------------------- changes


@contextmanager
def offloading_suspended(pipe: Any) -> Iterator[None]:
    """Remove accelerate's offloading hooks from `pipe` inside the context, and restore them afterwards, as for a LoRA.

    Raises:
        ValueError: group offloading keeps weights on disk.
    """
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    for name, part in parts.items():
        if any(group.offload_to_disk_path is not None for module in part.modules() for group in groups_of(module)):
            raise ValueError(
                f"Group offloading keeps the weights of {name} on disk, in files that do not follow a change of "
                "adapters: load, save or unload adapters first, then call enable_group_offload(…)."
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


def insert(model: nn.Module, adapter_name: str, part: AdapterPart, low_cpu_mem_usage: bool = True) -> None:
    """Add an adapter, inside `restored_on_error`. It is active, also if the others were disabled.

    A, B and magnitudes take the dtype of their base layer, like those of a LoRA, or float32 if layerwise casting stores
    the base as float8; the core stays in float32. Its dropout is at work only if `model` is in training mode.

    Raises:
        ValueError: the tensors are not those that the configuration needs in this model: see `strict.check_tensors`.
    """
    if any(parameter.dtype.is_floating_point and parameter.dtype.itemsize == 1 for parameter in model.parameters()):
        low_cpu_mem_usage = False  # by which PEFT converts A and B to the dtype of the base layer, float8
    layers = tuner_layers(model)
    if layers and all(layer.disable_adapters for layer in layers):
        logger.warning(
            "the adapters of %s were off, by disable_lora(): loading '%s' switches it on. pipe.set_adapters chooses.",
            type(model).__name__,
            adapter_name,
        )
    for layer in layers:
        layer._disable_adapters = False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # several are meant
        warnings.filterwarnings("ignore", message="The following .* keys did not match")  # the strict check says more
        inject_adapter_in_model(part.config, model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    tensors = _in_dtypes_of_layers(model, part.tensors)
    set_peft_model_state_dict(model, tensors, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    for layer in tuner_layers(model):
        if isinstance(layer, LoraLayer) and adapter_name in layer.lora_dropout:  # a new module is in training mode
            layer.lora_dropout[adapter_name].train(model.training)
    setattr(model, LOADED_FLAG, True)


def _in_dtypes_of_layers(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A, B and magnitudes in the dtypes for factors of their layers; all else as it is, for the strict check."""
    layers: dict[str, Any] = dict(model.named_modules())
    found = dict(tensors)
    for key, tensor in tensors.items():
        layer = layers.get(key.partition(".lora_")[0])
        if isinstance(layer, BaseTunerLayer) and not is_core_key(key) and tensor.is_floating_point():
            dtype = factor_dtype(getattr(getattr(layer.get_base_layer(), "weight", None), "dtype", None))
            found[key] = tensor if dtype is None else tensor.to(dtype)
    return found


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
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, LoraLayer) and not child.r:
                setattr(parent, name, child.get_base_layer())
    if not adapters_of(model):
        for name in ("peft_config", LOADED_FLAG):
            model.__dict__.pop(name, None)
    for parameter, requires_grad in trainable:
        parameter.requires_grad = requires_grad
