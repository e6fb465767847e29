"""Set the strength of an adapter to a number or to a function of λ.

A number sets the scale of PEFT's layers. For a strength over λ, the layers read s(λ) · C(λ) as
their core. The layers of a NaRA read a core anyway. The layers of a plain LoRA (PEFT's, or
"identity") get NaRA's LoRA variant while they have such a strength, and the model's root gets a
core holder if it has none. Removing the strength restores the state that PEFT created.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from nara_diffusion.config import NaraConfig, unscaled_fields
from nara_diffusion.cores.core_set import SHARED, CoreSet, core_group
from nara_diffusion.cores.other_cores import IdentityCore
from nara_diffusion.layers.dora import PEFT_DORA
from nara_diffusion.layers.targets import check_norm, variant_for
from nara_diffusion.layers.variants import NaraVariant
from nara_diffusion.noise.context import checked_module
from nara_diffusion.noise.level import is_number
from nara_diffusion.noise.rows import row_kind_of
from nara_diffusion.noise.strength_schedule import StrengthSchedule

from .holder import CoreHolder, drop_idle_holder, holder_of

Points = list[list[float]]
"""[λ, strength] for each point of a schedule, as in configurations."""


def set_strength(
    model: nn.Module, adapter_name: str, strength: StrengthSchedule | float | None
) -> None:
    """Set the strength of one adapter, a factor of its update, from the next forward on.

        set_strength(model, "default", StrengthSchedule([(0, 1.0), (0.7, 0.3)]))

    A schedule replaces the adapter's present schedule and number. A number replaces the present
    number, and multiplies the adapter's schedule, if it has one. None removes both. A schedule can
    only be removed with None.

    The adapter may be a NaRA or any LoRA, including DoRA. It may belong to a PeftModel, or may have
    been added by `inject_adapter_in_model` or loaded by Diffusers. With a schedule, forwards need
    λ, which comes from `noise_level(model, value)`, from a source set by `set_noise_source`, or, in
    a Diffusers denoiser, from the timestep. The weights of Diffusers' `set_adapters` have the same
    meaning. The call does not change which adapters are active. Deleting the adapter deletes its
    strength.

    Args:
        model: an adapted model. It may be wrapped (PeftModel, DDP, `torch.compile`).
        adapter_name: the name of the adapter, e.g. "default".
        strength: a schedule, a number, or None for 1 at every λ. A NaRA keeps a schedule in its
            configuration, so the schedule is saved and loaded with the adapter. A number is not
            saved, because PEFT does not save it.

    Raises:
        ValueError: there is no such adapter; the adapter is merged; `strength` has another type; or
            a schedule would scale only a part of the adapter (see `check_strength`).
    """
    schedule = strength if isinstance(strength, StrengthSchedule) else None
    number = strength if schedule is None and strength is not None else 1.0
    if not is_number(number):
        raise ValueError(
            f"strength is {strength!r}: pass StrengthSchedule([(λ, strength), …]), a finite number, or None for 1."
        )
    roots = roots_of(model, adapter_name)
    for root in roots:
        check_strength(root, adapter_name, schedule)
    for root in roots:
        if strength is None or schedule is not None:
            give_strength(root, adapter_name, schedule)
        for layer in layers_of(root, adapter_name).values():
            layer.set_scale(adapter_name, float(number))


def roots_of(model: nn.Module, adapter_name: str) -> list[Any]:
    """Return the models in `model`, or `model` itself, that have the adapter, without PEFT wrappers.

    Raises:
        ValueError: no model has the adapter.
    """
    adapted = {
        module: vars(module)["peft_config"]
        for module in checked_module(model).modules()
        if isinstance(vars(module).get("peft_config"), dict)
        and not isinstance(module, (PeftModel, BaseTuner))
    }
    roots = [module for module, names in adapted.items() if adapter_name in names]
    if not roots:
        listed = ", ".join(sorted({repr(name) for names in adapted.values() for name in names}))
        raise ValueError(
            f"{type(model).__name__} has no adapter {adapter_name!r}: it has {listed or 'none'}."
        )
    return roots


def layers_of(root: nn.Module, adapter_name: str) -> dict[str, Any]:
    """Return the layers of `root`, by name, that an adapter of any kind adapts."""
    layers = {}
    for name, module in root.named_modules():
        if isinstance(module, BaseTunerLayer):
            attributes = (*module.adapter_layer_names, *module.other_param_names)
            mappings = [getattr(module, attribute) for attribute in attributes]
            if any(hasattr(mapping, "keys") and adapter_name in mapping for mapping in mappings):
                layers[name] = module
    return layers


def strength_of(root: nn.Module, adapter_name: str) -> StrengthSchedule | None:
    """Return the adapter's strength over λ, or None if it has none."""
    holder = holder_of(root)
    if holder is None:
        return None
    holder.drop_deleted()
    return holder.schedules.get(adapter_name)


def give_strength(
    root: nn.Module, adapter_name: str, strength: StrengthSchedule | Points | None
) -> None:
    """Replace an adapter's strength over λ and, for a NaRA, also the one in its configuration.

    Args:
        strength: a schedule or points that `check_strength` accepts; None removes the strength.
    """
    config = _config_of(root, adapter_name)
    layers = layers_of(root, adapter_name)
    if strength is None:
        _take_strength(root, adapter_name, config, layers)
    else:
        holder = holder_of(root) or CoreHolder(root)
        holder.attach()
        if adapter_name not in holder.cores:
            rank = max(layer.r[adapter_name] for layer in layers.values())
            cores = CoreSet({SHARED: IdentityCore(rank)})
            holder.add(adapter_name, config, cores, list(layers.values()))
        for name, layer in layers.items():
            if not isinstance(layer.lora_variant.get(adapter_name), NaraVariant):
                variant = _variant_for(root, config, holder, layer, name, adapter_name)
                layer.lora_variant[adapter_name] = variant
        is_schedule = isinstance(strength, StrengthSchedule)
        holder.schedules[adapter_name] = strength if is_schedule else StrengthSchedule(strength)
    holder = holder_of(root)
    if holder is not None and isinstance(config, NaraConfig):
        config = copy(config)  # several models may share the original
        schedule = strength_of(root, adapter_name)
        config.strength = None if schedule is None else schedule.as_lists()
        holder.reconfigure(adapter_name, holder.finder.with_convention(adapter_name, config))


def _config_of(root: nn.Module, adapter_name: str) -> LoraConfig:
    configs: Any = root.peft_config
    return configs[adapter_name]


def _take_strength(
    root: nn.Module, adapter_name: str, config: LoraConfig, layers: Mapping[str, LoraLayer]
) -> None:
    """Undo `give_strength`. Repeating is safe."""
    holder = holder_of(root)
    if holder is None or strength_of(root, adapter_name) is None:
        return
    del holder.schedules[adapter_name]
    cores = holder.cores_of(adapter_name)
    if all(isinstance(core, IdentityCore) for core in cores.values()):
        for layer in layers.values():
            variant = layer.lora_variant.get(adapter_name)
            if isinstance(variant, NaraVariant) and variant.channel is holder.channel:
                del layer.lora_variant[adapter_name]
                of_peft = layer.resolve_lora_variant(config=config)
                if of_peft is not None:
                    layer.lora_variant[adapter_name] = of_peft
    if not isinstance(config, NaraConfig):
        holder.remove(adapter_name)
        if holder.finder.source_is_default:  # a source set by the user stays for a new strength
            drop_idle_holder(root)


def _variant_for(
    root: nn.Module,
    config: LoraConfig,
    holder: CoreHolder,
    layer: LoraLayer,
    name: str,
    adapter_name: str,
) -> NaraVariant:
    """Return NaRA's LoRA variant for a layer of a plain LoRA."""
    cores = holder.cores_of(adapter_name)
    group = next(iter(cores))
    if isinstance(config, NaraConfig):
        group_of_layer = core_group(config, name, layer.r[adapter_name])
        group = group_of_layer if group_of_layer in cores else group
    has_norm = isinstance(layer.lora_variant.get(adapter_name), PEFT_DORA)
    variant_class = variant_for(layer, name, has_norm)
    return variant_class(holder.channel, adapter_name, group, name, row_kind_of(root, name))


def check_strength(
    root: nn.Module, adapter_name: str, strength: StrengthSchedule | Points | None
) -> None:
    """Raise an error for a strength that would not affect the whole adapter.

    Raises:
        ValueError: the adapter is merged; or `strength` is not None, and the adapter has trained
            biases, modules of its own, or layers without support for LoRA variants.
    """
    layers = layers_of(root, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(
            f"Adapter '{adapter_name}' is merged, so its strength can't change: call pipe.unfuse_lora(), or "
            "unmerge_adapter() of the PeftModel, first."
        )
    if strength is None:
        return
    missed = _missed(root, layers, adapter_name)
    if missed is not None:
        raise ValueError(
            f"Adapter '{adapter_name}' cannot have a strength that depends on λ, because it would not scale "
            f"{missed}: pass a float."
        )


def _missed(root: nn.Module, layers: Mapping[str, BaseTunerLayer], adapter_name: str) -> str | None:
    """Return what a strength over λ would not scale, or None if it scales the whole adapter."""
    for name in unscaled_fields(_config_of(root, adapter_name)):
        return f"what {name} changes in the model"
    for name, layer in layers.items():
        variant = getattr(layer, "lora_variant", {}).get(adapter_name)
        if isinstance(variant, NaraVariant):
            continue
        is_known = variant is None or isinstance(variant, PEFT_DORA)
        if not isinstance(layer, LoraLayer) or not is_known:
            return f"layer '{name}', which is adapted by PEFT's {type(layer).__name__}"
        if variant is not None:
            check_norm(layer, name)
        variant_for(layer, name, variant is not None)
        if adapter_name in layer.lora_A:
            A: Any = layer.lora_A[adapter_name].weight
            if len(A) != layer.r[adapter_name]:
                return f"layer '{name}', since enable_lora_hotswap has made room there for rank {len(A)}"
    return None
