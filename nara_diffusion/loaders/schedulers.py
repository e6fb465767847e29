"""The scheduler that an adapter carries: described, built, set on a pipeline, and reset.

A pipeline's scheduler follows its active adapters: each function that loads, activates, disables or removes adapters
calls `follow_adapters`. A scheduler that already expects the right prediction stays, so that users may choose another
solver (UniPC instead of DPM-Solver).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn

from nara_diffusion.noise.schedulers.prediction import carried_scheduler, how_to_set, prediction_by, prediction_in
from nara_diffusion.noise.timesteps import count_timesteps
from nara_diffusion.tuner.holder.core_holder import holder_of

from .format import AdapterPart
from .guards import unwrapped
from .insertion import adapters_of

logger = logging.getLogger(__name__)

_REPLACED = "_nara_replaced_scheduler"
"""The attribute of a pipeline with the scheduler that it had before an adapter's was set."""

DENOISERS = ("unet", "transformer", "transformer_2", "unconditional_transformer", "prior", "decoder")
"""The components of pipelines that denoise: a second transformer for little noise (Wan 2.2) or for guidance (Ideogram
4), a prior of embeddings and a decoder of them (unCLIP, Kandinsky, Würstchen, Stable Cascade)."""


def scheduler_fields(scheduler: Any) -> dict[str, Any]:
    """The value of `NaraConfig(scheduler=…)`: class and configuration of a Diffusers scheduler."""
    fields = json.loads(scheduler.to_json_string())
    return {name: value for name, value in fields.items() if name not in ("_diffusers_version", "_use_default_values")}


def build_scheduler(fields: Mapping[str, Any]) -> Any:
    """The scheduler of these fields; the inverse of `scheduler_fields`.

    Raises:
        ValueError: a class that Diffusers doesn't have, or that refuses the configuration.
    """
    name = fields["_class_name"]
    kind: Any = getattr(diffusers, name, None)
    if not isinstance(kind, type) or SchedulerMixin not in kind.__mro__:
        raise ValueError(
            f"The adapter was trained for the scheduler {name}, which diffusers {diffusers.__version__} doesn't have: "
            "update it, or load with set_scheduler=False and set a scheduler of the same prediction."
        )
    try:
        scheduler = kind.from_config(dict(fields))
    except Exception as error:  # whatever its constructor says of values from a file
        raise ValueError(f"The adapter's scheduler {name} refuses its configuration: {error}: damaged.") from error
    for values in (getattr(scheduler, "betas", None), getattr(scheduler, "alphas_cumprod", None)):
        if values is not None and not (len(values) and bool(((values >= 0) & (values <= 1)).all())):
            raise ValueError(f"The adapter's scheduler {name} has no noise schedule, by its betas: damaged.")
    return scheduler


def follow_adapters(pipe: Any) -> None:
    """Set the scheduler that the active adapters were trained for, or the pipeline's own one if they carry none.

    λ = t / N then uses the N of that scheduler. With `set_scheduler=False` a warning names the scheduler instead.
    """
    fields, replaced = _carried(pipe), getattr(pipe, _REPLACED, None)
    if fields is None:
        if replaced is not None and prediction_by(pipe.scheduler) != prediction_by(replaced):
            pipe.scheduler = replaced
    elif prediction_by(getattr(pipe, "scheduler", None)) != prediction_in(fields):
        if replaced is not None:
            pipe.scheduler = build_scheduler(fields)
        else:
            logger.warning(
                "the active adapters predict %s, which the pipeline's scheduler doesn't expect: %s",
                prediction_in(fields),
                how_to_set(fields),
            )
    if replaced is not None and not any(_carries(model) for model in _denoisers(pipe)):
        delattr(pipe, _REPLACED)
    if isinstance(getattr(pipe, "scheduler", None), SchedulerMixin):
        for model in _denoisers(pipe):
            count_timesteps(model, pipe.scheduler)


def has_replaced_scheduler(pipe: Any) -> bool:
    """Whether the scheduler of an adapter has been set on `pipe`, and its own one is kept to be restored."""
    return _REPLACED in getattr(pipe, "__dict__", {})


def check_schedulers(pipe: Any, parts: Mapping[str, AdapterPart]) -> None:
    """Raises ValueError if an adapter carries a scheduler that cannot be built, or if `pipe` uses no scheduler."""
    for fields in _carried_by(parts):
        build_scheduler(fields)
        if not isinstance(getattr(pipe, "scheduler", None), SchedulerMixin):
            raise ValueError(
                f"The adapter was trained for the scheduler {fields['_class_name']}, and this {type(pipe).__name__} "
                "has no scheduler of Diffusers: load it into the pipeline that it was trained on."
            )


def adopt_schedulers(pipe: Any, parts: Mapping[str, AdapterPart]) -> None:
    """Set the scheduler that the loaded `parts` carry; from then on it follows the active adapters.

    If the pipeline's scheduler expects the right prediction already, it stays, and the user keeps control of it.
    """
    for fields in _carried_by(parts):
        if not hasattr(pipe, _REPLACED) and prediction_by(pipe.scheduler) != prediction_in(fields):
            setattr(pipe, _REPLACED, pipe.scheduler)
    follow_adapters(pipe)
    if hasattr(pipe, _REPLACED):  # for forwards in which no such adapter is active
        for holder in filter(None, map(holder_of, _denoisers(pipe))):
            holder.base_prediction = prediction_by(getattr(pipe, _REPLACED))


def check_agree(pipe: Any, adapter_names: str | Iterable[str]) -> None:
    """Raises ValueError if these adapters were trained for different predictions."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    for model in _denoisers(pipe):
        carried_scheduler(adapters_of(model), names)


def keep_if_fused(pipe: Any) -> None:
    """Before unloading: keep the scheduler of fused adapters, since they stay in the base weights."""
    for model in _denoisers(pipe):
        holder = holder_of(model)
        if holder is not None and carried_scheduler(adapters_of(model), holder.merged_adapters) is not None:
            pipe.__dict__.pop(_REPLACED, None)


def _carried_by(parts: Mapping[str, AdapterPart]) -> list[dict[str, Any]]:
    return [part.config.scheduler for part in parts.values() if part.config.scheduler is not None]


def _denoisers(pipe: Any) -> list[nn.Module]:
    """The denoisers of `pipe`, without the wrappers of torch.compile and PEFT."""
    found = [getattr(pipe, name, None) for name in DENOISERS]
    return [unwrapped(getattr(model, "_orig_mod", model)) for model in found if isinstance(model, nn.Module)]


def _carries(model: nn.Module) -> bool:
    return any(getattr(config, "scheduler", None) for config in adapters_of(model).values())


def _carried(pipe: Any) -> dict[str, Any] | None:
    """The fields of the scheduler that the active adapters were trained for."""
    for model in _denoisers(pipe):
        holder = holder_of(model)
        if holder is None:
            continue
        active = [] if holder.disable_adapters else holder.active_adapters
        fields = carried_scheduler(adapters_of(model), [*active, *holder.merged_adapters])
        if fields is not None:
            return fields
    return None
