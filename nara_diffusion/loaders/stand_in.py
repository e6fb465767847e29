"""A scheduler that stands in for a pipeline's own one, because an adapter needs it.

Pipelines of the same components (`from_pipe`) share the scheduler as they share the denoiser. One of them may remove
the adapter, and cannot reach the others, which would sample the base by the adapter's scheduler. So the stand-in knows
for which scheduler it stands, and as long as any pipeline has it, a hook on the denoisers refuses to sample by it once
the adapters are gone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from nara_diffusion.noise.schedulers.prediction import prediction_by, scheduler_at_work

from .insertion import adapters_of

_OWN = "_nara_stands_in_for"
"""The attribute of a stand-in with the scheduler for which it stands."""


def stand_in(scheduler: Any, own: Any, denoisers: Iterable[nn.Module]) -> Any:
    """Mark `scheduler` as a stand-in for `own`, by which `denoisers` then refuse to run without adapters; return it."""
    if stands_in_for(scheduler) is None:
        setattr(scheduler, _OWN, own)
        for model in denoisers:
            hook = model.register_forward_pre_hook(_check_adapters_are_there)
            weakref.finalize(scheduler, hook.remove).atexit = False
    return scheduler


def stands_in_for(scheduler: Any) -> Any:
    """The scheduler for which `scheduler` stands in; None if for none."""
    return getattr(scheduler, "__dict__", {}).get(_OWN)


def make_own(scheduler: Any) -> None:
    """Undo `stand_in`. Harmless when repeated."""
    scheduler.__dict__.pop(_OWN, None)


def carries_scheduler(model: nn.Module) -> bool:
    """Whether an adapter of `model`, active or not, carries a scheduler."""
    return any(getattr(config, "scheduler", None) for config in adapters_of(model).values())


@torch.compiler.disable(recursive=True)
def _check_adapters_are_there(model: nn.Module, args: Any) -> None:
    if carries_scheduler(model):
        return  # the holder of its cores compares both
    scheduler = scheduler_at_work()
    own = stands_in_for(scheduler)
    if own is None or prediction_by(scheduler) == prediction_by(own):
        return
    name = type(scheduler).__name__
    raise ValueError(
        f"This pipeline's scheduler, {name}, is for {prediction_by(scheduler)}, which an adapter made the denoiser "
        "predict that has been removed, by another pipeline or by a method of the model: pipe.unload_nara_weights() "
        f"brings the pipeline's own {type(own).__name__} back. If these weights do predict "
        f"{prediction_by(scheduler)}, pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config) says so."
    )
