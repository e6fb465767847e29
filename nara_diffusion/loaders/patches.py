"""Wrappers around Diffusers' methods that load, activate, merge and remove adapters.

Diffusers walks over the layers of a model. The holder of the cores is a child of the model's root, outside its blocks:

    save_lora_adapter  would write a NaRA into a file that is named and described as a LoRA's
    load_lora_adapter  activates the adapter that it has loaded in the layers only
    set_adapters       looks up a weight for each layer by the block in its name, and the holder is in no block; also,
                       weights may be functions of λ
    set_lora_device    moves the A and B of each layer, which the holder has not
    fuse_lora          merges layer by layer, so that half of them stay merged if λ is unknown, and doesn't say that
                       every step then runs at the C of one λ
    …_text_encoder…    are what set_adapters and fuse_lora call for any model of transformers, a pipeline's denoiser too
    …_lora, …_adapters  change which adapters are active, and with them the scheduler that the pipeline needs
    delete_adapters    activates another adapter layer by layer, and in the holder perhaps a different one
    disable_lora, …    skip a model that PEFT has wrapped, whose adapters would stay as they are
    unload_lora, …     restore the base layers, and leave the holder with its hooks and its source of λ
    _fetch_state_dict  takes a NaRA's file for a LoRA's, without its core

A model without a holder of cores, and a pipeline in which moreover no scheduler has been replaced, run Diffusers' own
code only: the condition of each wrapper says so. The last three wrappers read files and look at what they have read.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

import diffusers.loaders.lora_base as lora_base
import diffusers.loaders.lora_pipeline as lora_pipeline
import diffusers.loaders.peft as peft_loaders
import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.loaders.peft import PeftAdapterMixin
from peft.tuners.lora import LoraLayer

from nara_diffusion.config import NaraConfig
from nara_diffusion.runtime.offloading import check_kept_nowhere
from nara_diffusion.tuner.activation import deleting
from nara_diffusion.tuner.forward_hook import detach_holder
from nara_diffusion.tuner.holder.core_holder import holder_of
from nara_diffusion.tuner.injection import drop_idle_holder, without_holder
from nara_diffusion.tuner.strength.layers import take_strength
from nara_diffusion.utils.patching import around

from .fusing import active_in, check_none_left_out
from .guards import check_none_wrapped
from .hotswap import REQUEST, check_target_rank
from .insertion import adapters_of, unwrap
from .lora_files import fetch_without_cores, load_lora_metadata
from .schedulers import DENOISERS, check_agree, follow_adapters, has_replaced_scheduler, removing_adapters
from .strengths import check_components, has_functions, set_weights

logger = logging.getLogger(__name__)

_FUSE_REMEDY = "fuse_lora works at one λ: call it inside `with noise_level(pipe.unet, value):` (or pipe.transformer)."


def extend_diffusers_methods() -> None:
    """Install the wrappers below. Harmless when repeated."""
    around(PeftAdapterMixin, "save_lora_adapter", _save_lora_adapter, _has_holder)
    around(PeftAdapterMixin, "load_lora_adapter", _load_lora_adapter, _has_holder)
    around(PeftAdapterMixin, "set_adapters", _set_adapters, _has_holder_or_gets_schedule)
    around(PeftAdapterMixin, "fuse_lora", _fuse_lora, _has_holder)
    around(PeftAdapterMixin, "unload_lora", _unload_lora, _has_holder)
    around(PeftAdapterMixin, "delete_adapters", _delete_adapters, _has_holder)
    for name in ("disable_lora", "enable_lora"):
        around(LoraBaseMixin, name, _switch, _has_cores)
    around(LoraBaseMixin, "set_adapters", _set_pipeline_adapters, _has_cores_or_gets_schedule)
    around(lora_base, "set_adapters_for_text_encoder", _set_language_adapters, _language_has_holder_or_gets_schedule)
    around(lora_base, "fuse_text_encoder_lora", _fuse_lora, _has_holder)
    around(LoraBaseMixin, "fuse_lora", _fuse_pipeline, _has_cores)
    around(LoraBaseMixin, "unfuse_lora", _unfuse_pipeline, _has_cores)
    around(LoraBaseMixin, "set_lora_device", _set_lora_device, _has_cores)
    around(LoraBaseMixin, "unload_lora_weights", _then_tidy_up, _has_cores)
    around(LoraBaseMixin, "delete_adapters", _delete_pipeline_adapters, _has_cores)
    around(lora_pipeline, "_fetch_state_dict", fetch_without_cores)
    around(peft_loaders, "_fetch_state_dict", fetch_without_cores)
    around(lora_base, "_load_sft_state_dict_metadata", load_lora_metadata)


# ---------------------------------------------------------------------- when a wrapper has something to do


def _has_holder(model: Any, *args: Any, **kwargs: Any) -> bool:
    return holder_of(model) is not None


def _has_holder_or_gets_schedule(model: Any, adapter_names: Any, weights: Any = None) -> bool:
    return _has_holder(model) or has_functions(weights)


def _language_has_holder_or_gets_schedule(adapter_names: Any, text_encoder: Any = None, weights: Any = None) -> bool:
    return _has_holder_or_gets_schedule(text_encoder, adapter_names, weights)


def _has_cores(pipe: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether a component has a holder of cores, wrapped or not, or an adapter has replaced the scheduler."""
    components = {*pipe._lora_loadable_modules, *DENOISERS}
    return has_replaced_scheduler(pipe) or any(_has_holder(getattr(pipe, name, None)) for name in components)


def _has_cores_or_gets_schedule(pipe: Any, adapter_names: Any, adapter_weights: Any = None) -> bool:
    return _has_cores(pipe) or has_functions(adapter_weights)


# ---------------------------------------------------------------------- models


def _save_lora_adapter(
    original: Any, model: Any, save_directory: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
) -> None:
    if isinstance(adapters_of(model).get(adapter_name), NaraConfig):
        raise ValueError(
            f"Adapter '{adapter_name}' is a NaRA, which save_lora_adapter would write as a LoRA that nothing can load: "
            "call pipe.save_nara_weights(save_directory, adapter_name=…). Without a pipeline, "
            "peft.get_peft_model_state_dict(model, adapter_name=…) has its tensors."
        )
    original(model, save_directory, adapter_name, *args, **kwargs)


def _load_lora_adapter(original: Any, model: Any, *args: Any, **kwargs: Any) -> None:
    holder, request = holder_of(model), getattr(model, REQUEST, None)
    assert holder is not None
    if kwargs.get("hotswap"):
        _check_swapped_name(model, str(kwargs.get("adapter_name")))
    if request is not None:
        check_target_rank(model, request["target_rank"])
    original(model, *args, **kwargs)
    if kwargs.get("hotswap"):  # its strength was that of the LoRA that is gone
        name = str(kwargs.get("adapter_name"))
        take_strength(model, adapters_of(model)[name], name)
    # the LoRA is now the active one, in layers alone
    holder.set_adapter(next(layer.active_adapters for layer in model.modules() if isinstance(layer, LoraLayer)))


def _check_swapped_name(model: Any, name: str) -> None:
    """PEFT's hotswap puts to zero what the new LoRA lacks, and finds it by the name anywhere in a key."""
    for key in model.state_dict():
        if "lora_" in key and name in key and name not in key.split("."):
            raise ValueError(
                f"hotswap would put '{key}' of another adapter to zero, since '{name}' is a part of that key: load "
                "the LoRA under a longer name, and delete the old one."
            )


def _set_adapters(original: Any, model: Any, adapter_names: list[str] | str, weights: Any = None) -> None:
    def set_floats(model: Any, adapter_names: list[str] | str, weights: Any) -> None:
        with without_holder(model):
            original(model, adapter_names, weights)

    check_none_left_out(model, _listed(adapter_names))
    set_weights(set_floats, model, adapter_names, weights)
    holder = holder_of(model)
    if holder is not None:
        holder.set_adapter(adapter_names)


def _listed(adapter_names: list[str] | str) -> list[str]:
    return [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)


def _set_language_adapters(original: Any, adapter_names: list[str], text_encoder: Any, weights: Any = None) -> None:
    def of_model(model: Any, adapter_names: list[str], weights: Any) -> None:
        original(adapter_names, model, weights)

    _set_adapters(of_model, text_encoder, adapter_names, weights)


def _fuse_lora(
    original: Any,
    model: Any,
    lora_scale: float = 1.0,
    safe_fusing: bool = False,
    adapter_names: list[str] | None = None,
) -> None:
    fixed, noise_level = _check_fusable(model, adapter_names)
    original(model, lora_scale=lora_scale, safe_fusing=safe_fusing, adapter_names=adapter_names)
    if fixed:
        holder: Any = holder_of(model)
        holder.merged_level.is_fused = True
        logger.warning(
            "%s: %s is fused at noise_level %.6g: until unfuse_lora() every step runs at the C of that λ, whatever its "
            "own is.",
            type(model).__name__,
            " and ".join(map(repr, fixed)),
            noise_level,
        )


def _check_fusable(model: Any, adapter_names: list[str] | None) -> tuple[list[str], float | None]:
    """The adapters that will have the C of one λ, and this λ."""
    holder = holder_of(model)
    if holder is None:
        return [], None
    names = holder.active_adapters if adapter_names is None else adapter_names
    active = active_in(model)
    check_none_left_out(model, active, active if adapter_names is None else adapter_names)
    fixed = [name for name in names if holder.depends_on_noise(name)]
    signals = holder.signals_to_merge(fixed, _FUSE_REMEDY)
    check_kept_nowhere(model, LoraLayer)
    return fixed, None if signals is None else signals.noise_level.item()


def _unload_lora(original: Any, model: Any) -> None:
    detach_holder(model)
    original(model)
    unwrap(model)


def _delete_adapters(original: Any, model: Any, adapter_names: list[str] | str) -> None:
    names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
    if not adapters_of(model).keys() - names:
        model.unload_lora()  # Diffusers would leave every layer in an empty wrapper
        return
    with deleting([model], names):
        original(model, adapter_names)
    drop_idle_holder(model)


# ---------------------------------------------------------------------- pipelines


def _switch(original: Any, pipe: Any, *args: Any, **kwargs: Any) -> None:
    check_none_wrapped(pipe, pipe._lora_loadable_modules, original.__name__)
    original(pipe, *args, **kwargs)
    follow_adapters(pipe)


def _set_pipeline_adapters(
    original: Any, pipe: Any, adapter_names: list[str] | str, adapter_weights: Any = None
) -> None:
    check_none_wrapped(pipe, pipe._lora_loadable_modules, "set_adapters")
    check_agree(pipe, adapter_names)
    check_components(pipe, adapter_names, adapter_weights)
    for component in pipe._lora_loadable_modules:
        check_none_left_out(getattr(pipe, component, None), _listed(adapter_names))
    original(pipe, adapter_names, adapter_weights)
    follow_adapters(pipe)


def _adaptable(pipe: Any) -> list[Any]:
    return [model for name in pipe._lora_loadable_modules if (model := getattr(pipe, name, None)) is not None]


def _set_lora_device(original: Any, pipe: Any, adapter_names: list[str], device: Any) -> None:
    check_none_wrapped(pipe, pipe._lora_loadable_modules, "set_lora_device")
    models = _adaptable(pipe)
    with ExitStack() as hidden:
        for model in models:
            hidden.enter_context(without_holder(model))
        original(pipe, adapter_names, device)
    for holder in filter(None, map(holder_of, models)):
        for name in adapter_names:
            holder._move_adapter_to_device_of_base_layer(name, torch.device(device))


def _fuse_pipeline(original: Any, pipe: Any, components: list[str] | None = None, *args: Any, **kwargs: Any) -> None:
    check_none_wrapped(pipe, components or [], "fuse_lora")
    names = kwargs.get("adapter_names", args[2] if len(args) > 2 else None)
    for component in components or []:  # before the first of them is changed
        _check_fusable(getattr(pipe, component, None), names)
    original(pipe, components, *args, **kwargs)


def _unfuse_pipeline(original: Any, pipe: Any, *args: Any, **kwargs: Any) -> None:
    original(pipe, *args, **kwargs)
    follow_adapters(pipe)


def _delete_pipeline_adapters(original: Any, pipe: Any, adapter_names: list[str] | str) -> None:
    check_none_wrapped(pipe, pipe._lora_loadable_modules, "delete_adapters")
    with deleting(_adaptable(pipe), adapter_names):
        _then_tidy_up(original, pipe, adapter_names)


def _then_tidy_up(original: Any, pipe: Any, *args: Any, **kwargs: Any) -> None:
    """Remove the holders of text encoders, whose layers Diffusers removes by functions of its own."""
    check_none_wrapped(pipe, pipe._lora_loadable_modules, original.__name__)
    with removing_adapters(pipe):
        original(pipe, *args, **kwargs)
        for component in pipe._lora_loadable_modules:
            model: Any = getattr(pipe, component, None)
            if holder_of(model) is None:
                continue
            drop_idle_holder(model)
            if not adapters_of(model):
                unwrap(model)
