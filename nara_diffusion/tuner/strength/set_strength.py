"""`set_strength`: the strength of an adapter, as a number or as a function of λ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from numbers import Real
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.noise.strength import StrengthSchedule
from nara_diffusion.tuner.holder.core_holder import holder_of

from .conversions import warn_where_off
from .layers import check_strength, give_strength, layers_of, live_strengths


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
            adapter (see `strength_layers.check_strength`).
    """
    checked = _checked(strength)
    roots = roots_of(model, adapter_name)
    schedules = {}
    for root in roots:
        is_schedule = isinstance(checked, StrengthSchedule)
        schedules[root] = dict.fromkeys(layers_of(root, adapter_name), checked) if is_schedule else {}
        check_strength(root, root.peft_config[adapter_name], adapter_name, schedules[root])
    for root, by_layer in schedules.items():
        if strength is None or by_layer:
            replace_schedules(root, adapter_name, by_layer)
        for layer in layers_of(root, adapter_name).values():
            layer.set_scale(adapter_name, 1.0 if isinstance(checked, StrengthSchedule) else checked)
        warn_where_off(root, adapter_name)


def replace_schedules(root: Any, adapter_name: str, by_layer: Mapping[str, StrengthSchedule]) -> None:
    """Replace the schedules of all layers of the adapter; a NaRA's configuration has the one that all of them share.

    Args:
        by_layer: name of a layer of `root` → its schedule, checked by `check_strength`.
    """
    give_strength(root, root.peft_config[adapter_name], adapter_name, by_layer)
    old, holder = root.peft_config[adapter_name], holder_of(root)
    if not isinstance(old, NaraConfig) or holder is None:
        return
    convention_stated = old.noise_convention is not None and not holder.conventions.is_undecided(adapter_name)
    config = copy(old)  # the caller's may serve several models
    strength = shared_schedule(root, adapter_name)
    config.strength = None if strength is None else strength.as_lists()
    root.peft_config[adapter_name] = config = holder.conventions.completed(adapter_name, config)
    holder.configure(adapter_name, config, convention_stated)


def shared_schedule(root: Any, adapter_name: str) -> StrengthSchedule | None:
    """The schedule of an adapter, if it is one for all of its layers."""
    live, layers = live_strengths(root, adapter_name), layers_of(root, adapter_name)
    return next(iter(live.values())) if len(live) == len(layers) and len(set(live.values())) == 1 else None


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
    """The models at or below `model` that have the adapter, without PEFT's wrappers."""
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
