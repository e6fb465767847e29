"""Compare how the adapters of a model are used with how they were trained."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from peft import LoraConfig

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


_KINDS = {"sample": "sample", "part": "part of a sample (a frame, a block)"}
"""`NaraConfig.noise_level_per` → its name in messages."""


class Usage:
    """Compare how the adapters of one model are used with how they were trained.

    `NaraConfig` says how a few-step adapter is sampled (`few_steps`), and whether training used one
    λ for each sample or for each part of a sample (`noise_level_per`). Each setting that
    differs causes one warning per adapter.

    Attributes:
        pipelines: weak references to the pipelines that loaded adapters.
    """

    def __init__(self, configs: dict[str, LoraConfig]) -> None:
        self.configs = configs
        self.pipelines: list[weakref.ref[DiffusionPipeline]] = []
        self._warned_of_sampling: dict[tuple[str, str], LoraConfig] = {}  # of (adapter, setting)
        self._warned_of_parts: dict[str, LoraConfig] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pipelines": []}  # a copy has no pipelines

    # ------------------------------------------------------------------ the pipelines' schedulers

    def add_pipeline(self, pipe: DiffusionPipeline) -> None:
        """Remember a pipeline that loaded an adapter."""
        self.pipelines = [ref for ref in self.pipelines if ref() not in (None, pipe)]
        self.pipelines.append(weakref.ref(pipe))

    def schedulers(self) -> list[SchedulerMixin]:
        """Return the current schedulers of the pipelines that loaded adapters."""
        schedulers: list[Any] = [
            getattr(reference(), "scheduler", None) for reference in self.pipelines
        ]
        return [scheduler for scheduler in schedulers if hasattr(scheduler, "config")]

    def warn_of_sampling(self, names: Iterable[str]) -> None:
        """Warn once of each setting of a pipeline that does not suit a few-step adapter."""
        warned = self._warned_of_sampling
        for name in names:
            config = self.configs[name]
            few_steps = getattr(config, "few_steps", None)
            if few_steps is None:
                continue
            for reference in self.pipelines:
                pipe = reference()
                settings = {} if pipe is None else _other_settings(pipe, few_steps)
                if all(warned.get((name, setting)) is config for setting in settings):
                    continue
                warned |= {(name, setting): config for setting in settings}
                steps = few_steps["num_inference_steps"]
                call = f"pipe(…, num_inference_steps={steps}, guidance_scale=1)"
                remedy = "; ".join(filter(None, (few_steps.get("scheduler"), call)))
                warnings.warn(
                    f"Adapter '{name}' was trained to sample in {steps} steps, but the pipeline takes "
                    f"{', '.join(settings.values())}: {remedy}",
                    stacklevel=2,
                )

    # ------------------------------------------------------------------ samples or their parts

    def warn_of_parts(self, names: Iterable[str], per: str) -> None:
        """Warn once if an adapter was trained with λ per sample and is used per part, or vice versa.

        Args:
            per: what has one λ in the present forward, "sample" or "part".
        """
        for name in names:
            config = self.configs[name]
            trained = getattr(config, "noise_level_per", None)
            if trained in (None, per) or self._warned_of_parts.get(name) is config:
                continue
            self._warned_of_parts[name] = config
            warnings.warn(
                f"Adapter '{name}' was trained with λ for each {_KINDS[trained]}, and this forward has one for "
                f"each {_KINDS[per]}, which it has not seen: its results may be worse.",
                UserWarning,
                stacklevel=2,
            )


TIMESTEP_SETTINGS = ("timestep_spacing", "shift_terminal")
"""Fields of a scheduler that a few-step adapter was trained with."""


def _other_settings(pipe: Any, few_steps: Mapping[str, Any]) -> dict[str, str]:
    """Return {setting: its value, for a message} of a pipeline that don't suit a few-step adapter."""
    scheduler = getattr(pipe, "scheduler", None)
    # the scheduler of a flow has no number before its first call
    steps = getattr(scheduler, "num_inference_steps", None)
    if scheduler is None or steps is None:  # no call is in progress, as in training
        return {}
    settings = {}
    if steps != few_steps["num_inference_steps"]:
        settings["steps"] = f"{steps} steps"
    guidance = getattr(pipe, "_guidance_scale", 1.0)
    if guidance > 1:
        settings["guidance"] = f"guidance_scale {guidance:g}"
    for name in TIMESTEP_SETTINGS:
        trained = few_steps.get(name)
        if trained is not None and scheduler.config.get(name) != trained:
            settings["timesteps"] = f"{type(scheduler).__name__} with other timesteps"
    return settings
