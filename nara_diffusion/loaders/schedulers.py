"""The scheduler that an adapter carries: described, built, set on a pipeline, and reset.

Loading an adapter that changes what the model predicts sets its scheduler, and `set_adapters` and `unload_nara_weights`
keep to the active ones. A scheduler that already expects the right prediction stays, so that users may choose another
solver (UniPC instead of DPM-Solver). Each forward refuses a pipeline's scheduler that expects something else.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn

from nara_diffusion.noise.prediction import carried_scheduler, how_to_set, prediction_by, prediction_in
from nara_diffusion.tuner.conventions import REPLACED
from nara_diffusion.tuner.holder import holder_of

from .insertion import unwrapped

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
        return kind.from_config(dict(fields))
    except Exception as error:  # whatever its constructor says of values from a file
        raise ValueError(f"The adapter's scheduler {name} refuses its configuration: {error}: damaged.") from error


def check_schedulers(pipe: Any, parts: Mapping[str, Any]) -> None:
    """Raises ValueError if an adapter carries a scheduler that cannot be built, or if `pipe` uses no scheduler.

    Args:
        parts: component → what has the adapter's configuration as `config`.
    """
    for fields in _carried_by(parts):
        build_scheduler(fields)
        if not isinstance(getattr(pipe, "scheduler", None), SchedulerMixin):
            raise ValueError(
                f"The adapter was trained for the scheduler {fields['_class_name']}, and this {type(pipe).__name__} "
                "has no scheduler of Diffusers: load it into the pipeline that it was trained on."
            )


def adopt_schedulers(pipe: Any, parts: Mapping[str, Any]) -> None:
    """Set the scheduler that the loaded `parts` carry, and have their λ read by the pipeline's present one.

    If the pipeline's scheduler expects the right prediction already, it stays, and the user keeps control of it.
    """
    for fields in _carried_by(parts):
        if prediction_by(pipe.scheduler) != prediction_in(fields):
            vars(pipe).setdefault(REPLACED, pipe.scheduler)
    for holder in filter(None, map(holder_of, _denoisers(pipe))):
        holder.add_pipeline(pipe)
    follow_adapters(pipe)


def follow_adapters(pipe: Any) -> None:
    """Set the scheduler that the active adapters were trained for, or the pipeline's own one if they carry none.

    A warning names the scheduler instead, where it was left to the user by `set_scheduler=False`.
    """
    fields, scheduler, own = _carried(pipe), getattr(pipe, "scheduler", None), vars(pipe).get(REPLACED)
    wanted = prediction_by(own) if fields is None else prediction_in(fields)
    if wanted is None or prediction_by(scheduler) == wanted:
        return
    if own is not None:
        pipe.scheduler = own if fields is None else build_scheduler(fields)
        return
    logger.warning(
        "the active adapters predict %s, which the pipeline's scheduler doesn't expect: %s", wanted, how_to_set(fields)
    )


@contextmanager
def removing_adapters(pipe: Any) -> Iterator[None]:
    """Around what removes adapters: without any that carries a scheduler, the pipeline has its own one again."""
    yield
    for holder in filter(None, map(holder_of, _denoisers(pipe))):
        holder.drop_deleted()
    follow_adapters(pipe)
    configs = (config for model in _denoisers(pipe) for config in getattr(model, "peft_config", {}).values())
    if not any(getattr(config, "scheduler", None) for config in configs):
        vars(pipe).pop(REPLACED, None)


def denoiser_name(pipe: Any) -> str:
    """The component that an adapter without named parts is for. Raises ValueError if the pipeline has no denoiser."""
    for name in DENOISERS:
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise ValueError(
        f"{type(pipe).__name__} has none of {', '.join(DENOISERS)}, one of which a NaRA adapts: its components are "
        f"{', '.join(map(repr, pipe.components))}."
    )


def _carried_by(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [part.config.scheduler for part in parts.values() if part.config.scheduler is not None]


def _denoisers(pipe: Any) -> list[Any]:
    """The denoisers of `pipe`, without the wrappers of torch.compile and PEFT."""
    found = [getattr(pipe, name, None) for name in DENOISERS]
    return [unwrapped(getattr(model, "_orig_mod", model)) for model in found if isinstance(model, nn.Module)]


def _carried(pipe: Any) -> dict[str, Any] | None:
    """The fields of the scheduler that the active or merged adapters were trained for."""
    for model in _denoisers(pipe):
        holder = holder_of(model)
        names = [] if holder is None else [*holder.reading(), *holder.merged_names()]
        if fields := carried_scheduler(getattr(model, "peft_config", {}), names):
            return fields
    return None
