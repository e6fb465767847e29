"""`set_strength`: the strength of an adapter, as a number or as a function of λ.

The layers read s(λ) · C(λ) as their core. The layers of a NaRA read a core anyway. The layers of a plain LoRA (PEFT's,
or "identity") get NaRA's LoRA variant while they have such a strength, and the model's root gets a holder of cores if
it has none. When the strength is removed, everything is as PEFT made it. A number is the scale of PEFT's layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from numbers import Real
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant, _DoraConvNdVariant
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from nara_diffusion.config import NaraConfig, unscaled_fields
from nara_diffusion.cores.registry import SHARED, CoreSet, core_group
from nara_diffusion.cores.simple import IdentityCore
from nara_diffusion.layers.dispatch import check_target, variant_for
from nara_diffusion.layers.rows import rows_of
from nara_diffusion.layers.variants import NaraVariant
from nara_diffusion.noise.denoisers import denoiser_of
from nara_diffusion.noise.strength_schedule import StrengthSchedule

from .holder import CoreHolder, drop_idle_holder, holder_of

_DORA = (DoraLinearVariant, _DoraConvNdVariant)


def set_strength(model: nn.Module, adapter_name: str, strength: StrengthSchedule | float | None) -> None:
    """Set the strength of one adapter of `model`, by which its update is multiplied, from the next forward on.

        set_strength(model, "default", StrengthSchedule([(0, 1.0), (0.7, 0.3)]))

    A schedule replaces the one that the adapter has, and any number. A number multiplies the schedule that the adapter
    has, if any, in place of a former number. None removes both, and is the only way to be rid of a schedule.

    The adapter may be a NaRA or any LoRA (DoRA too), of a PeftModel, of `inject_adapter_in_model` or loaded by
    Diffusers. With a schedule, forwards have to know λ: from `noise_level(model, value)`, a source set by
    `set_noise_source`, or, for a denoiser of Diffusers, its timestep. The weights of Diffusers' `set_adapters` mean the
    same. It does not change which adapters are active. Deleting the adapter deletes it.

    Args:
        model: an adapted model, wrapped (PeftModel, DDP, `torch.compile`) or not.
        adapter_name: e.g. "default".
        strength: a schedule, which a NaRA keeps in its configuration, so that it is saved and loaded with it; a number,
            which is not saved, as PEFT saves none; or None: 1 at every λ.

    Raises:
        ValueError: there is no such adapter; `strength` is none of these; or a schedule would scale only a part of the
            adapter (see `check_strength`).
    """
    checked = _checked(strength)
    schedule = checked if isinstance(checked, StrengthSchedule) else None
    schedules = {root: for_all_layers(root, adapter_name, schedule) for root in roots_of(model, adapter_name)}
    for root, by_layer in schedules.items():
        check_strength(root, adapter_name, by_layer)
    for root, by_layer in schedules.items():
        if strength is None or by_layer:
            give_strength(root, adapter_name, by_layer)
        for layer in layers_of(root, adapter_name).values():
            layer.set_scale(adapter_name, 1.0 if isinstance(checked, StrengthSchedule) else checked)


def _checked(strength: Any) -> StrengthSchedule | float:
    if strength is None:
        return 1.0
    if isinstance(strength, StrengthSchedule):
        return strength
    if not isinstance(strength, Real) or isinstance(strength, bool) or not math.isfinite(strength):
        raise ValueError(
            f"strength is {strength!r}: pass StrengthSchedule([(λ, strength), …]), a finite number, or None for 1."
        )
    return float(strength)


def roots_of(model: Any, adapter_name: str) -> list[Any]:
    """The models at or below `model` that have the adapter, without PEFT's wrappers; at least one."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"{type(model).__name__} is no torch.nn.Module: pass the model itself, e.g. pipe.unet.")
    roots: list[Any] = [
        module
        for module in model.modules()
        if isinstance(vars(module).get("peft_config"), dict) and not isinstance(module, (PeftModel, BaseTuner))
    ]
    found = [root for root in roots if adapter_name in root.peft_config]
    if not found:
        names = sorted({name for root in roots for name in root.peft_config})
        raise ValueError(
            f"{type(model).__name__} has no adapter {adapter_name!r}: it has {', '.join(map(repr, names)) or 'none'}."
        )
    return found


def layers_of(root: nn.Module, adapter_name: str) -> dict[str, Any]:
    """Name → layer, for all layers of `root` that the adapter adapts. The adapter may be of any kind."""
    layers = {name: module for name, module in root.named_modules() if isinstance(module, BaseTunerLayer)}
    return {name: layer for name, layer in layers.items() if adapter_name in layer._all_available_adapter_names()}


def for_all_layers(root: nn.Module, adapter_name: str, strength: Any) -> dict[str, StrengthSchedule]:
    """A strength over λ, or its points, for `give_strength`: for all layers of the adapter; empty if it is None."""
    if strength is None:
        return {}
    schedule = strength if isinstance(strength, StrengthSchedule) else StrengthSchedule(strength)
    return dict.fromkeys(layers_of(root, adapter_name), schedule)


def live_strengths(root: nn.Module, adapter_name: str) -> dict[str, StrengthSchedule]:
    """Name of a layer → its strength as a function of λ, for the layers of the adapter that have one."""
    if not has_strength(root, adapter_name):
        return {}
    holder: Any = holder_of(root)
    readers = holder.readers[adapter_name]
    found = {name: readers[variant.key[1]].schedule for name, variant in _variants(root, adapter_name, holder).items()}
    return {name: schedule for name, schedule in found.items() if schedule is not None}


def has_strength(root: nn.Module, adapter_name: str) -> bool:
    """Whether the strength of the adapter depends on λ."""
    holder = holder_of(root)
    if holder is None:
        return False
    holder.drop_deleted()
    return any(reader.schedule is not None for reader in holder.readers.get(adapter_name, {}).values())


def _variants(root: nn.Module, adapter_name: str, holder: CoreHolder) -> dict[str, NaraVariant]:
    """Name of a layer → the variant by which it reads its core from this holder."""
    layers = layers_of(root, adapter_name).items()
    found = {name: getattr(layer, "lora_variant", {}).get(adapter_name) for name, layer in layers}
    return {
        name: variant
        for name, variant in found.items()
        if isinstance(variant, NaraVariant) and variant.channel is holder.channel
    }


# ---------------------------------------------------------------------- giving and taking


def give_strength(root: Any, adapter_name: str, by_layer: Mapping[str, StrengthSchedule]) -> None:
    """Set the strengths over λ of the layers of an adapter; they replace all previous ones. A NaRA's configuration has
    the one that all of its layers share.

    Args:
        by_layer: name of a layer of `root` → its strength, checked by `check_strength`.
    """
    _take_strength(root, adapter_name)
    config, layers = root.peft_config[adapter_name], layers_of(root, adapter_name)
    holder = _holder_with(root, adapter_name, layers) if by_layer else holder_of(root)
    if holder is None or adapter_name not in holder.cores:
        return
    for name in by_layer:
        variants = layers[name].lora_variant
        if not isinstance(variants.get(adapter_name), NaraVariant):
            variants[adapter_name] = _variant_for(root, config, holder, layers[name], name, adapter_name)
    if by_layer:
        holder.readers[adapter_name] = {}
        for name, variant in _variants(root, adapter_name, holder).items():
            variant.key = holder.key_of(adapter_name, variant.group, by_layer.get(name))
    if isinstance(config, NaraConfig):
        config = copy(config)  # the caller's may serve several models
        shared = len(by_layer) == len(layers) and len(set(by_layer.values())) == 1
        config.strength = next(iter(by_layer.values())).as_lists() if shared else None
        holder.reconfigure(adapter_name, holder.complete(adapter_name, config))


def _take_strength(root: Any, adapter_name: str) -> None:
    """Undo `give_strength`. Harmless when repeated."""
    holder = holder_of(root)
    if holder is None or not has_strength(root, adapter_name):
        return
    config, cores = root.peft_config[adapter_name], holder.cores[adapter_name]
    is_plain = all(isinstance(core, IdentityCore) for core in cores.values())  # type: ignore[operator]
    layers, holder.readers[adapter_name] = layers_of(root, adapter_name), {}
    for group in cores:  # type: ignore[union-attr]
        holder.key_of(adapter_name, group)
    for name, variant in _variants(root, adapter_name, holder).items():
        variant.key = holder.key_of(adapter_name, variant.group)
        if is_plain:
            del layers[name].lora_variant[adapter_name]
            own = layers[name].resolve_lora_variant(config=config)
            if own is not None:
                layers[name].lora_variant[adapter_name] = own
    if not isinstance(config, NaraConfig):
        holder.remove(adapter_name)
        if holder.source_is_default:  # a source that a user has set serves the next strength too
            drop_idle_holder(root)


def _holder_with(root: Any, adapter_name: str, layers: dict[str, Any]) -> CoreHolder:
    """The holder of `root`, made if there is none, with the adapter in it."""
    holder = holder_of(root)
    if holder is None:
        holder = CoreHolder(root, denoiser_of(root))
        holder.attach()
    if adapter_name not in holder.cores:
        rank = max(layer.r[adapter_name] for layer in layers.values())
        cores = CoreSet({SHARED: IdentityCore(rank)})
        holder.add(adapter_name, root.peft_config[adapter_name], cores, list(layers.values()))
    return holder


def _variant_for(
    root: nn.Module, config: Any, holder: CoreHolder, layer: Any, name: str, adapter_name: str
) -> NaraVariant:
    """NaRA's LoRA variant for a layer of a plain LoRA."""
    cores: Any = holder.cores[adapter_name]
    own = core_group(config, name, layer.r[adapter_name]) if isinstance(config, NaraConfig) else ""
    group = own if own in cores else next(iter(cores))
    variant_class = variant_for(layer, isinstance(layer.lora_variant.get(adapter_name), _DORA), name)
    return variant_class(holder.channel, adapter_name, group, name, rows_of(root, name))


def check_strength(root: Any, adapter_name: str, by_layer: Mapping[str, StrengthSchedule]) -> None:
    """Refuse strengths that come after merging, or that would scale only a part of the adapter: it has layers without
    LoRA variants, biases, or modules of its own."""
    layers = layers_of(root, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(
            f"Adapter '{adapter_name}' is merged, at the strength that it had: call pipe.unfuse_lora(), or "
            "unmerge_adapter() of the PeftModel, before you change its strength."
        )
    fields = unscaled_fields(root.peft_config[adapter_name]) if by_layer else []
    missed = [f"what {name} changes in the model" for name in fields]
    missed = missed or list(filter(None, (_missed(layers[name], name, adapter_name) for name in by_layer)))
    if missed:
        raise ValueError(
            f"Adapter '{adapter_name}' cannot have a strength that depends on λ, which would not reach {missed[0]}: "
            "give this adapter a float."
        )


def _missed(layer: Any, name: str, adapter_name: str) -> str | None:
    """What a strength in the place of C would not scale, if the layer is such."""
    variant = getattr(layer, "lora_variant", {}).get(adapter_name)
    if isinstance(variant, NaraVariant):
        return None
    if not isinstance(layer, LoraLayer) or not isinstance(variant, (*_DORA, type(None))):
        return f"layer '{name}', which is adapted by PEFT's {type(layer).__name__}"
    check_target(layer, variant is not None, name)
    variant_for(layer, variant is not None, name)
    A: Any = layer.lora_A[adapter_name].weight if adapter_name in layer.lora_A else None
    if A is not None and len(A) != layer.r[adapter_name]:
        return f"layer '{name}', in which enable_lora_hotswap has made room for rank {len(A)}"
    return None
