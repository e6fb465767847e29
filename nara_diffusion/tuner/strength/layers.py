"""Setting and removing a λ-dependent strength of the layers of one adapter.

The layers read s(λ) · C(λ) as their core. The layers of a NaRA read a core anyway. The layers of a plain LoRA (PEFT's,
or "identity") get NaRA's LoRA variant while they have such a strength, and the model's root gets a holder of cores if
it has none. When the strength is removed, everything is as PEFT made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant, _DoraConvNdVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.cores.simple import IdentityCore
from nara_diffusion.layers.dispatch import check_target, variant_for
from nara_diffusion.layers.variants import NaraVariant
from nara_diffusion.noise.denoisers.lookup import denoiser_of
from nara_diffusion.noise.strength import StrengthSchedule
from nara_diffusion.runtime.batch_rows import rows_of
from nara_diffusion.tuner.forward_hook import attach_holder
from nara_diffusion.tuner.holder.core_holder import CoreHolder, holder_of
from nara_diffusion.tuner.holder.core_set import core_group
from nara_diffusion.tuner.injection import drop_idle_holder

from .scheduled_cores import ScaledCore

_DORA = (DoraLinearVariant, _DoraConvNdVariant)
_REMEDY = "give this adapter a float"


def layers_of(root: nn.Module, adapter_name: str) -> dict[str, Any]:
    """Name → layer, for all layers of `root` that the adapter adapts. The adapter may be of any kind."""
    layers = {name: module for name, module in root.named_modules() if isinstance(module, BaseTunerLayer)}
    return {
        name: layer
        for name, layer in layers.items()
        if not isinstance(layer, CoreHolder) and adapter_name in layer._all_available_adapter_names()
    }


def check_strength(root: nn.Module, config: Any, adapter_name: str, by_layer: Mapping[str, StrengthSchedule]) -> None:
    """Refuse strengths that would scale only a part of the adapter, or that come after merging.

    Raises:
        ValueError: the adapter is merged; or it has layers without LoRA variants, biases, or modules of its own.
    """
    layers = layers_of(root, adapter_name)
    _check_unmerged(layers, adapter_name)
    if not by_layer:
        return
    for name, module in root.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._get_available_adapters():
            raise ValueError(_refusal(adapter_name, f"'{name}', which is trained and saved as a whole"))
    for name in by_layer:
        _check_layer(layers[name], name, adapter_name)
    if config.bias != "none":
        raise ValueError(_refusal(adapter_name, f"the biases that it trains (bias={config.bias!r})"))


def give_strength(root: nn.Module, config: Any, adapter_name: str, by_layer: Mapping[str, StrengthSchedule]) -> None:
    """Set the strengths of the layers of an adapter; they replace all previous ones.

    Args:
        config: of the adapter. by_layer: name of a layer of `root` → its strength, checked by `check_strength`.
    """
    take_strength(root, config, adapter_name)
    if not by_layer:
        return
    layers, holder = layers_of(root, adapter_name), _holder_with(root, adapter_name)
    variants: dict[str, NaraVariant] = {}
    for name, layer in layers.items():
        if name in by_layer and not isinstance(layer.lora_variant.get(adapter_name), NaraVariant):
            layer.lora_variant[adapter_name] = _variant_for(root, config, holder, layer, name, adapter_name)
        variant = layer.lora_variant.get(adapter_name)
        if isinstance(variant, NaraVariant) and variant.channel is holder.channel:
            variants[name] = variant
    holder.strengths[adapter_name] = _named(variants, by_layer)


def take_strength(root: nn.Module, config: Any, adapter_name: str) -> None:
    """Undo `give_strength`. Harmless when repeated."""
    holder = holder_of(root)
    if holder is None or holder.strengths.pop(adapter_name, None) is None:
        return
    cores: Any = holder.cores[adapter_name]
    is_plain = all(isinstance(core, IdentityCore) for core in cores.values())
    for layer in layers_of(root, adapter_name).values():
        variant = layer.lora_variant.get(adapter_name)
        if not isinstance(variant, NaraVariant) or variant.channel is not holder.channel:
            continue
        variant.key = (adapter_name, variant.group)
        if is_plain:
            del layer.lora_variant[adapter_name]
            own = layer.resolve_lora_variant(config=config)
            if own is not None:
                layer.lora_variant[adapter_name] = own
    if not isinstance(config, NaraConfig):
        holder.forget(adapter_name)
        if holder.conventions.source_is_default:  # a source that a user has set serves the next strength too
            drop_idle_holder(root)


def default_strengths(root: nn.Module, config: Any, adapter_name: str) -> dict[str, StrengthSchedule]:
    """The strengths of a new adapter for `give_strength`, from its configuration."""
    points = getattr(config, "strength", None)
    return dict.fromkeys(layers_of(root, adapter_name), StrengthSchedule(points)) if points else {}


def live_strengths(root: nn.Module, adapter_name: str) -> dict[str, StrengthSchedule]:
    """Name of a layer → its strength as a function of λ, for the layers of the adapter that have one."""
    holder = holder_of(root)
    strengths = {} if holder is None else holder.strengths.get(adapter_name, {})
    found = {}
    for name, layer in layers_of(root, adapter_name).items() if strengths else ():
        variant = layer.lora_variant.get(adapter_name)
        if isinstance(variant, NaraVariant) and variant.key[1] in strengths:
            found[name] = strengths[variant.key[1]].schedule
    return {name: schedule for name, schedule in found.items() if schedule is not None}


def has_strength(root: nn.Module, adapter_name: str) -> bool:
    """Whether the strength of the adapter depends on λ."""
    holder = holder_of(root)
    return holder is not None and adapter_name in holder.strengths


def _named(variants: Mapping[str, NaraVariant], by_layer: Mapping[str, StrengthSchedule]) -> dict[str, ScaledCore]:
    """Name each pair of core and strength, and make its layers read by that name.

    A core whose layers all have one strength keeps its own name.
    """
    scaled = {name: ScaledCore(variant.group, by_layer.get(name)) for name, variant in variants.items()}
    distinct = list(dict.fromkeys(scaled.values()))
    strengths_of = {of.group: [other for other in distinct if other.group == of.group] for of in distinct}
    names = {
        of: group if len(found) == 1 else f"{group} at strength {index}"
        for group, found in strengths_of.items()
        for index, of in enumerate(found)
    }
    for name, variant in variants.items():
        variant.key = (variant.key[0], names[scaled[name]])
    return {label: of for of, label in names.items()}


def _holder_with(root: nn.Module, adapter_name: str) -> CoreHolder:
    """The holder of `root`, made if there is none, with the adapter in it."""
    layers = layers_of(root, adapter_name)
    holder = holder_of(root)
    if holder is None:
        holder = CoreHolder(denoiser_of(root))
        first = next(iter(layers.values()))
        holder._active_adapter = list(first.active_adapters)
        holder._disable_adapters = first.disable_adapters
        attach_holder(holder, root)
    if adapter_name not in holder.cores:
        holder.add_plain(adapter_name, max(layer.r[adapter_name] for layer in layers.values()))
    return holder


def _variant_for(
    root: nn.Module, config: Any, holder: CoreHolder, layer: Any, name: str, adapter_name: str
) -> NaraVariant:
    """NaRA's LoRA variant for a layer of a plain LoRA."""
    use_dora = isinstance(layer.lora_variant.get(adapter_name), _DORA)
    cores: Any = holder.cores[adapter_name]
    own = core_group(config, name, layer.r[adapter_name]) if isinstance(config, NaraConfig) else ""
    group = own if own in cores else next(iter(cores))
    variant_class = variant_for(layer, use_dora, name)
    return variant_class(holder.channel, holder.core_to_merge, adapter_name, group, name, rows_of(root, name))


# ---------------------------------------------------------------------- refused


def _check_unmerged(layers: Mapping[str, Any], adapter_name: str) -> None:
    for name, layer in layers.items():
        if adapter_name in layer.merged_adapters:
            raise ValueError(
                f"Adapter '{adapter_name}' is merged into '{name}', at the strength that it had: call "
                "pipe.unfuse_lora(), or unmerge_adapter() of the PeftModel, before you change its strength."
            )


def _check_layer(layer: Any, name: str, adapter_name: str) -> None:
    kind = type(layer).__name__
    if not isinstance(layer, LoraLayer):
        raise ValueError(_refusal(adapter_name, f"layer '{name}', which is adapted by PEFT's {kind} and not by a LoRA"))
    variant = layer.lora_variant.get(adapter_name)
    if layer.lora_bias.get(adapter_name):
        raise ValueError(_refusal(adapter_name, f"the bias of B (lora_bias=True) of layer '{name}'"))
    if isinstance(variant, NaraVariant):
        return
    if variant is not None and not isinstance(variant, _DORA):
        raise ValueError(_refusal(adapter_name, f"layer '{name}', whose LoRA variant is {type(variant).__name__}"))
    try:
        check_target(layer, variant is not None, name)
        variant_for(layer, variant is not None, name)
    except ValueError as error:
        base = type(layer.get_base_layer()).__name__
        raise ValueError(_refusal(adapter_name, f"layer '{name}' ({base}, adapted by PEFT's {kind})")) from error
    A: Any = layer.lora_A[adapter_name].weight if adapter_name in layer.lora_A else None
    if A is not None and len(A) != layer.r[adapter_name]:
        raise ValueError(
            f"Adapter '{adapter_name}' cannot have a strength that depends on λ: enable_lora_hotswap has made room in "
            f"layer '{name}' for rank {len(A)} beside its own {layer.r[adapter_name]}. Load it without, or {_REMEDY}."
        )


def _refusal(adapter_name: str, what: str) -> str:
    return (
        f"Adapter '{adapter_name}' cannot have a strength that depends on λ, which would not reach {what}: {_REMEDY}."
    )
