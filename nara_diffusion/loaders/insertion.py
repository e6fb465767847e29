"""Components of a pipeline: insert an adapter, swap or remove it, and suspend offloading meanwhile.

Hotswap replaces an adapter's weights in place, so that a compiled model is not recompiled. The new one has the ranks of
the old one: C(λ) is r × r. `enable_lora_hotswap(target_rank=r)`, with r its own rank, makes the scales tensors, so that
adapters with other lora_alpha don't recompile the model either.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from peft import PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn

from nara_diffusion.config import NaraConfig, changes_base
from nara_diffusion.cores.registry import CustomCore, needs_noise, rebuild_core
from nara_diffusion.layers.offloading import groups_of
from nara_diffusion.strict import adapter_tensors, check_tensors
from nara_diffusion.tuner.holder import drop_idle_holder, holder_of
from nara_diffusion.tuner.strength import check_strength, give_strength, layers_of, strength_of

from .adapter_part import AdapterPart, by_pattern, configured_scaling

logger = logging.getLogger(__name__)

TEXT_ENCODER = "text_encoder"
"""The beginning of the names of the text encoders' components."""
LOADED_FLAG = "_hf_peft_config_loaded"
"""The attribute by which Diffusers and Transformers know that a model has adapters."""
REQUEST = "_prepare_lora_hotswap_kwargs"
"""The attribute in which `enable_lora_hotswap` stores its arguments until the next load."""
_HAS_TO_AGREE = (
    "r", "rank_pattern", "core_type", "core_hidden_dims", "core_sharing", "rank_mask_min", "core_bins",
    "core_knots", "noise_embedding", "noise_embedding_dim", "use_dora", "lora_bias",
    "lora_dropout",
)  # fmt: skip
"""Fields that define the modules, which hotswap keeps. All else of an adapter is tensors, scales and η."""
_REMEDY = "load it without hotswap under another name, and delete the old one."


def tuner_layers(model: nn.Module) -> list[Any]:
    """PEFT's layers of all kinds."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def adapters_of(model: nn.Module) -> dict[str, Any]:
    """{adapter name: configuration} of all adapters."""
    return getattr(model, "peft_config", None) or {}


def nara_adapters_of(model: nn.Module) -> dict[str, NaraConfig]:
    """{adapter name: configuration} of the NaRA adapters."""
    return {
        name: config
        for name, config in adapters_of(model).items()
        if isinstance(config, NaraConfig)
    }


def part_of(model: nn.Module, adapter_name: str) -> AdapterPart:
    """The adapter's configuration and tensors, as saved in a file."""
    return AdapterPart(nara_adapters_of(model)[adapter_name], adapter_tensors(model, adapter_name))


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
    fields = {
        "bias": "none",
        "modules_to_save": None,
        "trainable_token_indices": None,
        "target_parameters": None,
    }
    wrong = [
        name
        for name, default in fields.items()
        if (getattr(config, name, None) or default) != default
    ]
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
        if any(
            group.offload_to_disk_path is not None
            for module in part.modules()
            for group in groups_of(module)
        ):
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


def insert(
    model: nn.Module, adapter_name: str, part: AdapterPart, low_cpu_mem_usage: bool = True
) -> None:
    """Add an adapter, inside `restored_on_error`. It is active, also if the others were disabled.

    A, B and magnitudes take the dtype of their base layer, like those of a LoRA, or float32 if layerwise casting stores
    the base as float8; the core stays in float32. Its dropout is at work only if `model` is in training mode.

    Raises:
        ValueError: the tensors are not those that the configuration needs in this model: see `strict.check_tensors`.
    """
    if any(
        parameter.dtype.is_floating_point and parameter.dtype.itemsize == 1
        for parameter in model.parameters()
    ):
        low_cpu_mem_usage = (
            False  # by which PEFT converts A and B to the dtype of the base layer, float8
        )
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
        warnings.filterwarnings(
            "ignore", message="Already found a `peft_config` attribute"
        )  # several are meant
        warnings.filterwarnings(
            "ignore", message="The following .* keys did not match"
        )  # the strict check says more
        inject_adapter_in_model(
            part.config, model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
        )
    set_peft_model_state_dict(
        model, part.tensors, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
    )
    held = {
        key: tensor
        for key, tensor in adapter_tensors(model, adapter_name).items()
        if not tensor.is_meta
    }
    check_tensors(held, held)  # in the dtypes of their layers, to which PEFT has converted them
    for layer in tuner_layers(model):
        if (
            isinstance(layer, LoraLayer) and adapter_name in layer.lora_dropout
        ):  # a new module is in training mode
            layer.lora_dropout[adapter_name].train(model.training)
    setattr(model, LOADED_FLAG, True)


def remove(model: nn.Module, adapter_names: list[str]) -> None:
    """Remove adapters. The others stay as they are, active or not; without any, the base model is restored."""
    layers = tuner_layers(model)
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = [
        [name for name in layer.active_adapters if name not in adapter_names] for layer in layers
    ]
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


# ---------------------------------------------------------------------- hotswap


def prepare_for_hotswap(model: Any) -> None:
    """Make scales tensors, and pad the LoRAs, if `enable_lora_hotswap` was called since the last load.

    Raises:
        ValueError: a NaRA has another rank than the target, to which PEFT pads. RuntimeError: the model is compiled.
    """
    request = getattr(model, REQUEST, None)
    if request is None:
        return
    for name, config in adapters_of(model).items():
        ranks = {config.r, *(config.rank_pattern or {}).values()}
        if ranks != {request["target_rank"]} and (
            isinstance(config, NaraConfig) or strength_of(model, name)
        ):
            raise ValueError(
                f"enable_lora_hotswap was given target_rank={request['target_rank']}, but '{name}', whose update "
                f"depends on λ, has rank {', '.join(map(str, sorted(ranks)))}: it is swapped at equal rank alone, so "
                "pass that as target_rank, or load without enable_lora_hotswap."
            )
    prepare_model_for_compiled_hotswap(model, **request)
    setattr(model, REQUEST, None)


def check_swappable(
    model: nn.Module, component: str, adapter_name: str, part: AdapterPart | None
) -> None:
    """Raises ValueError if the part, None for none, cannot take the place of the adapter of that name."""
    if part is None:
        if adapter_name in adapters_of(model):
            raise ValueError(
                f"The new adapter has no part for '{component}', where '{adapter_name}' has one that would stay, so "
                f"that both would be mixed: remove it by pipe.delete_adapters('{adapter_name}'), then load without "
                "hotswap."
            )
        return
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
    holder: Any = holder_of(model)
    holder.finder.with_convention(adapter_name, part.config)
    check_strength(model, adapter_name, part.config.strength)
    check_tensors(part.tensors, part_of(model, adapter_name).tensors)


def prepare_swap(model: Any, adapter_name: str, part: AdapterPart) -> Callable[[], None]:
    """Compute all that takes the adapter's place, which may raise; what is returned then writes it, in place."""
    config, there = part.config, part_of(model, adapter_name).tensors
    holder: Any = holder_of(model)
    cores, layers = holder.cores[adapter_name], layers_of(model, adapter_name)
    scales = {
        name: configured_scaling(config, name, by_pattern(config.rank_pattern, name, config.r))
        for name in layers
    }
    custom = [group for group, core in cores.items() if isinstance(core, CustomCore)]
    rebuilt = {
        group: rebuild_core(cores[group], config) for group in custom
    }  # only its factory knows what it reads
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
            layer.lora_alpha[adapter_name] = by_pattern(
                config.alpha_pattern, name, config.lora_alpha
            )
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
