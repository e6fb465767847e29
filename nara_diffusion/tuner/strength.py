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
from nara_diffusion.layers.dispatch import check_norm, variant_for
from nara_diffusion.layers.variants import NaraVariant
from nara_diffusion.noise.denoisers import denoiser_of
from nara_diffusion.noise.level import checked_module
from nara_diffusion.noise.rows import row_kind_of
from nara_diffusion.noise.strength_schedule import StrengthSchedule

from .holder import CoreHolder, drop_idle_holder, holder_of

_DORA = (DoraLinearVariant, _DoraConvNdVariant)


def set_strength(
    model: nn.Module, adapter_name: str, strength: StrengthSchedule | float | None
) -> None:
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
    is_schedule = isinstance(strength, StrengthSchedule)
    number: Any = 1.0 if strength is None or is_schedule else strength
    if not isinstance(number, Real) or isinstance(number, bool) or not math.isfinite(number):
        raise ValueError(
            f"strength is {strength!r}: pass StrengthSchedule([(λ, strength), …]), a finite number, or None for 1."
        )
    roots = roots_of(model, adapter_name)
    for root in roots:
        check_strength(root, adapter_name, strength if is_schedule else None)
    for root in roots:
        if strength is None or is_schedule:
            give_strength(root, adapter_name, strength)
        for layer in layers_of(root, adapter_name).values():
            layer.set_scale(adapter_name, float(number))


def roots_of(model: Any, adapter_name: str) -> list[Any]:
    """The models at or below `model` that have the adapter, without PEFT's wrappers; at least one."""
    roots: list[Any] = [
        module
        for module in checked_module(model).modules()
        if isinstance(vars(module).get("peft_config"), dict)
        and not isinstance(module, (PeftModel, BaseTuner))
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
    layers = {
        name: module for name, module in root.named_modules() if isinstance(module, BaseTunerLayer)
    }
    return {
        name: layer
        for name, layer in layers.items()
        if adapter_name in layer._all_available_adapter_names()
    }


def strength_of(root: nn.Module, adapter_name: str) -> StrengthSchedule | None:
    """The strength of the adapter as a function of λ, if it has one."""
    holder = holder_of(root)
    if holder is None:
        return None
    holder.drop_deleted()
    return holder.schedules.get(adapter_name)


# ---------------------------------------------------------------------- giving and taking


def give_strength(root: Any, adapter_name: str, strength: Any) -> None:
    """Replace the strength over λ of an adapter by another, checked by `check_strength`, its points, or None. The
    configuration of a NaRA has it too."""
    config, layers = root.peft_config[adapter_name], layers_of(root, adapter_name)
    if strength is None:
        _take_strength(root, adapter_name, config, layers)
    else:
        holder = _holder_with(root, adapter_name, layers)
        for name, layer in layers.items():
            if not isinstance(layer.lora_variant.get(adapter_name), NaraVariant):
                layer.lora_variant[adapter_name] = _variant_for(
                    root, config, holder, layer, name, adapter_name
                )
        schedule = (
            strength if isinstance(strength, StrengthSchedule) else StrengthSchedule(strength)
        )
        holder.schedules[adapter_name] = schedule
    holder = holder_of(root)
    if holder is not None and isinstance(config, NaraConfig):
        config, schedule = (
            copy(config),
            strength_of(root, adapter_name),
        )  # the caller's may serve several models
        config.strength = None if schedule is None else schedule.as_lists()
        holder.reconfigure(adapter_name, holder.finder.with_convention(adapter_name, config))


def _take_strength(root: Any, adapter_name: str, config: Any, layers: Mapping[str, Any]) -> None:
    """Undo `give_strength`. Harmless when repeated."""
    holder = holder_of(root)
    if holder is None or strength_of(root, adapter_name) is None:
        return
    del holder.schedules[adapter_name]
    cores: Any = holder.cores[adapter_name]
    is_plain = all(isinstance(core, IdentityCore) for core in cores.values())
    for layer in layers.values() if is_plain else ():
        variant = layer.lora_variant.get(adapter_name)
        if isinstance(variant, NaraVariant) and variant.channel is holder.channel:
            del layer.lora_variant[adapter_name]
            own = layer.resolve_lora_variant(config=config)
            if own is not None:
                layer.lora_variant[adapter_name] = own
    if not isinstance(config, NaraConfig):
        holder.remove(adapter_name)
        if (
            holder.finder.source_is_default
        ):  # a source that a user has set serves the next strength too
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
    variant_class = variant_for(
        layer, isinstance(layer.lora_variant.get(adapter_name), _DORA), name
    )
    return variant_class(holder.channel, adapter_name, group, name, row_kind_of(root, name))


def check_strength(root: Any, adapter_name: str, strength: Any) -> None:
    """Refuse what comes after merging, and a strength over λ that would scale only a part of the adapter: it has layers
    without LoRA variants, biases, or modules of its own."""
    layers = layers_of(root, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(
            f"Adapter '{adapter_name}' is merged, at the strength that it had: call pipe.unfuse_lora(), or "
            "unmerge_adapter() of the PeftModel, before you change its strength."
        )
    if strength is None:
        return
    missed = [
        f"what {name} changes in the model"
        for name in unscaled_fields(root.peft_config[adapter_name])
    ]
    missed = missed or list(
        filter(None, (_missed(layer, name, adapter_name) for name, layer in layers.items()))
    )
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
    if variant is not None:
        check_norm(layer.get_base_layer(), name)
    variant_for(layer, variant is not None, name)
    A: Any = layer.lora_A[adapter_name].weight if adapter_name in layer.lora_A else None
    if A is not None and len(A) != layer.r[adapter_name]:
        return f"layer '{name}', in which enable_lora_hotswap has made room for rank {len(A)}"
    return None
