"""The scheduler that an adapter carries: described, built, set on a pipeline, and reset.

A pipeline's scheduler follows its active adapters: each function that loads, activates, disables or removes adapters
calls `follow_adapters`. A scheduler that already expects the right prediction stays, so that users may choose another
solver (UniPC instead of DPM-Solver).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn

from nara_diffusion.noise.schedulers.prediction import carried_scheduler, how_to_set, prediction_by, prediction_in
from nara_diffusion.noise.schedulers.timestep_meaning import REPLACED
from nara_diffusion.noise.timesteps import count_timesteps
from nara_diffusion.tuner.holder.core_holder import holder_of

from .file import AdapterPart
from .guards import unwrapped
from .insertion import adapters_of
from .stand_in import carries_scheduler, make_own, stand_in, stands_in_for

logger = logging.getLogger(__name__)

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


def follow_adapters(pipe: Any, removed: Iterable[Mapping[str, Any]] = ()) -> None:
    """Set the scheduler that the active adapters were trained for, or the pipeline's own one if they carry none.

    λ = t / N then uses the N of that scheduler. With `set_scheduler=False` a warning names the scheduler instead.

    Args:
        pipe: the pipeline.
        removed: the schedulers that adapters carried which have just been removed.
    """
    fields, own, models = _carried(pipe), _own_scheduler(pipe), _denoisers(pipe)
    scheduler = getattr(pipe, "scheduler", None)
    if own is None:
        _warn_of_mismatch(pipe, fields, removed)
    elif prediction_by(scheduler) != (prediction_by(own) if fields is None else prediction_in(fields)):
        if scheduler is not own:  # other pipelines may have it too
            stand_in(scheduler, own, models)
        pipe.scheduler = own if fields is None else stand_in(build_scheduler(fields), own, models)
    if own is not None and any(map(carries_scheduler, models)):
        setattr(pipe, REPLACED, own)
    else:
        pipe.__dict__.pop(REPLACED, None)
    if isinstance(getattr(pipe, "scheduler", None), SchedulerMixin):
        for model in models:
            count_timesteps(model, pipe.scheduler)


def has_replaced_scheduler(pipe: Any) -> bool:
    """Whether the scheduler of an adapter has been set on `pipe`, and its own one is kept to be restored."""
    of_pipe = getattr(pipe, "__dict__", {})
    return REPLACED in of_pipe or stands_in_for(of_pipe.get("scheduler")) is not None


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
    own = _own_scheduler(pipe)
    for fields in _carried_by(parts):
        if own is None and prediction_by(pipe.scheduler) != prediction_in(fields):
            own = pipe.scheduler
    if own is not None:
        setattr(pipe, REPLACED, own)
        for holder in filter(None, map(holder_of, _denoisers(pipe))):
            holder.base_prediction = prediction_by(own)  # for forwards in which no such adapter is active
    follow_adapters(pipe)


def check_agree(pipe: Any, adapter_names: str | Iterable[str]) -> None:
    """Raises ValueError if these adapters were trained for different predictions."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    for model in _denoisers(pipe):
        carried_scheduler(adapters_of(model), names)


@contextmanager
def removing_adapters(pipe: Any) -> Iterator[None]:
    """Around what removes adapters: the scheduler follows, or stays if a fused adapter stays in the base weights."""
    before = [(model, dict(adapters_of(model)), _merged(model)) for model in _denoisers(pipe)]
    yield
    removed = []
    for model, configs, merged in before:
        gone = configs.keys() - adapters_of(model).keys()
        fused = carried_scheduler(configs, gone.intersection(merged))
        if fused is not None:
            _keep(pipe, model, fused)
        removed += [_fields(configs[name]) for name in gone.difference(merged) if _fields(configs[name])]
    follow_adapters(pipe, removed)


def _merged(model: nn.Module) -> list[str]:
    holder = holder_of(model)
    return [] if holder is None else list(holder.merged_adapters)


def _keep(pipe: Any, model: nn.Module, fields: Mapping[str, Any]) -> None:
    """Make the scheduler of fused adapters the pipeline's own."""
    own = _own_scheduler(pipe)
    pipe.__dict__.pop(REPLACED, None)
    if own is not None and prediction_by(pipe.scheduler) != prediction_in(fields):  # since it was disabled
        pipe.scheduler = build_scheduler(fields)
    make_own(pipe.scheduler)
    holder = holder_of(model)
    if holder is not None:
        holder.base_prediction = prediction_in(fields)


def _own_scheduler(pipe: Any) -> Any:
    """What `pipe` samples by without adapters; None if its scheduler is left to the user."""
    scheduler, replaced = getattr(pipe, "scheduler", None), pipe.__dict__.get(REPLACED)
    own = stands_in_for(scheduler)
    if own is not None:
        return own if replaced is None else replaced
    holders = filter(None, map(holder_of, _denoisers(pipe)))
    base = next((holder.base_prediction for holder in holders if holder.base_prediction), prediction_by(replaced))
    is_for_base = base is not None and prediction_by(scheduler) == base
    return scheduler if is_for_base else replaced


def _warn_of_mismatch(pipe: Any, fields: Mapping[str, Any] | None, removed: Iterable[Mapping[str, Any]]) -> None:
    scheduler = getattr(pipe, "scheduler", None)
    if fields is not None:
        if prediction_by(scheduler) != prediction_in(fields):
            logger.warning(
                "the active adapters predict %s, which the pipeline's scheduler doesn't expect: %s",
                prediction_in(fields),
                how_to_set(fields),
            )
        return
    inactive = [prediction_in(fields) for fields in (*removed, *_all_carried(pipe))]
    if inactive and prediction_by(scheduler) in inactive:
        logger.warning(
            "no active adapter predicts %s now, which the pipeline's scheduler expects. It was not set by an adapter, "
            "and so it stays: %s",
            prediction_by(scheduler),
            how_to_set(None),
        )


def _carried_by(parts: Mapping[str, AdapterPart]) -> list[dict[str, Any]]:
    return [part.config.scheduler for part in parts.values() if part.config.scheduler is not None]


def _denoisers(pipe: Any) -> list[nn.Module]:
    """The denoisers of `pipe`, without the wrappers of torch.compile and PEFT."""
    found = [getattr(pipe, name, None) for name in DENOISERS]
    return [unwrapped(getattr(model, "_orig_mod", model)) for model in found if isinstance(model, nn.Module)]


def _fields(config: Any) -> Any:
    """The fields of the scheduler that an adapter of any kind carries, if it does."""
    return getattr(config, "scheduler", None)


def _all_carried(pipe: Any) -> list[dict[str, Any]]:
    """The fields of the schedulers that adapters, active or not, were trained for."""
    configs = [config for model in _denoisers(pipe) for config in adapters_of(model).values()]
    return [_fields(config) for config in configs if _fields(config)]


def _carried(pipe: Any) -> dict[str, Any] | None:
    """The fields of the scheduler that the active adapters were trained for."""
    for model in _denoisers(pipe):
        holder = holder_of(model)
        if holder is None:
            continue
        active = [] if holder.disable_adapters else [*holder.active_adapters, *holder.merged_adapters]
        fields = carried_scheduler(adapters_of(model), active)
        if fields is not None:
            return fields
    return None
