"""Wrappers around methods of PEFT's `LoraModel` that walk over LoRA layers and so miss the holder of the cores.

`NaraModel` overrides what it needs. The wrappers are for plain LoRAs on a model that has a holder, because the strength
of a LoRA depends on λ; on a model without a holder they call PEFT's own methods.

    set_adapter, delete_adapter    skip modules that are no LoRA layers: the wrapper calls the holder too
    _unload_and_optionally_merge   restores the base layers only: the wrapper removes the holder with its hooks
    merge_adapter                  merges layer by layer, and stops halfway if λ is unknown: all layers or none
    merge_and_unload               the same, without an argument for λ
    add_weighted_adapter           sums A's and B's without their strength: refused
    _enable_peft_forward_hooks     has the adapter of each sample of a batch: the holder gets them
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn

from nara_diffusion.noise.context import MixedBatch
from nara_diffusion.runtime.context_stack import entered
from nara_diffusion.tuner.activation import deleting
from nara_diffusion.tuner.forward_hook import detach_holder
from nara_diffusion.tuner.holder.core_holder import holder_of
from nara_diffusion.tuner.injection import drop_idle_holder
from nara_diffusion.tuner.merging import MergesAtOneLevel, merge_and_unload_at_one_level, merge_at_one_level
from nara_diffusion.tuner.strength.layers import has_strength
from nara_diffusion.utils.patching import around


def extend_lora_methods() -> None:
    """Install the wrappers below. Harmless when repeated."""
    around(LoraModel, "set_adapter", _set_adapter, _is_plain_with_holder)
    around(LoraModel, "delete_adapter", _delete_adapter, _is_plain_with_holder)
    around(LoraModel, "_unload_and_optionally_merge", _unload, _is_plain_with_holder)
    around(LoraModel, "merge_adapter", _merge_adapter, _is_plain_with_holder)
    around(LoraModel, "merge_and_unload", _merge_and_unload, _is_plain_with_holder)
    around(LoraModel, "add_weighted_adapter", _add_weighted_adapter, _has_holder)
    around(LoraModel, "_enable_peft_forward_hooks", _enable_forward_hooks, _has_mixed_batch)


def _has_holder(tuner: Any, *args: Any, **kwargs: Any) -> bool:
    return holder_of(tuner.model) is not None


def _is_plain_with_holder(tuner: Any, *args: Any, **kwargs: Any) -> bool:
    return not isinstance(tuner, MergesAtOneLevel) and _has_holder(tuner)


def _has_mixed_batch(tuner: Any, *args: Any, **kwargs: Any) -> bool:
    return kwargs.get("adapter_names") is not None and _has_holder(tuner)


def _set_adapter(original: Any, tuner: Any, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    original(tuner, adapter_name, inference_mode)
    holder: Any = holder_of(tuner.model)
    if holder.merged:
        holder.unmerge()
    holder.set_adapter(adapter_name, inference_mode=inference_mode)


def _delete_adapter(original: Any, tuner: Any, adapter_name: str) -> None:
    holder: Any = holder_of(tuner.model)
    with deleting([tuner.model], adapter_name):
        original(tuner, adapter_name)
        holder.delete_adapter(adapter_name)
    drop_idle_holder(tuner.model)


def _unload(original: Any, tuner: Any, *args: Any, **kwargs: Any) -> nn.Module:
    model = original(tuner, *args, **kwargs)
    detach_holder(tuner.model)
    return model


def _merge_adapter(original: Any, tuner: Any, *args: Any, **kwargs: Any) -> None:
    merge_at_one_level(tuner, partial(original, tuner), *args, **kwargs)


def _merge_and_unload(original: Any, tuner: Any, *args: Any, **kwargs: Any) -> nn.Module:
    return merge_and_unload_at_one_level(tuner, partial(original, tuner), *args, **kwargs)


def _add_weighted_adapter(original: Any, tuner: Any, adapters: list[str], *args: Any, **kwargs: Any) -> None:
    for name in adapters:
        if has_strength(tuner.model, name):
            raise ValueError(
                f"add_weighted_adapter would ignore the strength of adapter '{name}', which depends on λ. Activate "
                "several adapters together instead, model.base_model.set_adapter([…]), or take the strength away: "
                f"set_strength(model, '{name}', None)."
            )
    original(tuner, adapters, *args, **kwargs)


@contextmanager
def _enable_forward_hooks(original: Any, tuner: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    names: list[str] = kwargs["adapter_names"]
    holder: Any = holder_of(tuner.model)
    _check_mixed_batch(tuner.model, names)
    beams = kwargs.get("num_beams") or 1
    repeated = [name for name in names for _ in range(beams)]  # as `generate` repeats the batch
    failure = None
    mixed = entered(frozenset([holder.channel]), MixedBatch(repeated))
    with original(tuner, *args, **kwargs), mixed:
        try:
            yield
        except BaseException as error:  # PEFT takes its hooks away only if nothing is raised here
            failure = error
    if failure is not None:
        raise failure


def _check_mixed_batch(model: nn.Module, adapter_names: list[str]) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and set(layer.lora_embedding_A) & set(layer.lora_variant) & set(adapter_names):
            raise ValueError(
                f"adapter_names cannot be used while the embedding '{name}' is adapted with NaRA, or at a strength "
                "that depends on λ: PEFT would apply it without its core. Use one adapter a batch."
            )
