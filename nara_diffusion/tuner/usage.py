"""Remember the pipelines of an adapted model, and compare how they sample with the training."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftConfig

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


@dataclass(frozen=True)
class FewStepSampling:
    """How a few-step adapter samples: the content of `NaraConfig.few_steps`."""

    num_inference_steps: int
    guidance_scale: float = 1.0
    timesteps: Sequence[float] = ()
    scheduler: str = ""  # code that sets it in a pipeline; empty if the model's own will do
    timestep_spacing: str | None = None  # a setting of that scheduler, as is the next one
    shift_terminal: float | None = None

    @classmethod
    def of(cls, config: PeftConfig) -> FewStepSampling | None:
        """Return the sampling in an adapter's configuration; None for other adapters."""
        stored = getattr(config, "few_steps", None)
        if stored is None:
            return None
        return cls(
            **{field.name: stored[field.name] for field in fields(cls) if field.name in stored}
        )

    @property
    def code(self) -> str:
        """The code that samples so in a pipeline `pipe`."""
        call = f"pipe(…, num_inference_steps={self.num_inference_steps}, guidance_scale=1)"
        return f"{self.scheduler}; {call}" if self.scheduler else call

    def differences(self, pipe: Any) -> dict[str, str]:
        """Return {setting: its value, for a message} of the settings of `pipe` that differ.

        Outside of a call of the pipeline, as in training, none differs.
        """
        scheduler = getattr(pipe, "scheduler", None)
        # the scheduler of a flow has no number before its first call
        steps = getattr(scheduler, "num_inference_steps", None)
        if scheduler is None or steps is None:
            return {}
        settings = {}
        if steps != self.num_inference_steps:
            settings["steps"] = f"{steps} steps"
        guidance = getattr(pipe, "_guidance_scale", 1.0)
        if guidance > 1:
            settings["guidance"] = f"guidance_scale {guidance:g}"
        for name in ("timestep_spacing", "shift_terminal"):
            trained = getattr(self, name)
            if trained is not None and scheduler.config.get(name) != trained:
                settings["timesteps"] = f"{type(scheduler).__name__} with other timesteps"
        return settings


class Usage:
    """Compare the pipelines of one model with how its few-step adapters were trained to sample.

    `NaraConfig.few_steps` says how. Each setting that differs causes one warning per adapter.

    Attributes:
        pipelines: the pipelines that loaded adapters, weakly referenced.
    """

    def __init__(self, configs: dict[str, LoraConfig]) -> None:
        self.configs = configs
        self.pipelines: weakref.WeakSet[DiffusionPipeline] = weakref.WeakSet()
        self._warned: dict[tuple[str, str], LoraConfig] = {}  # of (adapter, setting)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.configs,)  # a copy has no pipelines

    def schedulers(self) -> list[SchedulerMixin]:
        """Return the current schedulers of the pipelines that loaded adapters."""
        schedulers: list[Any] = [getattr(pipe, "scheduler", None) for pipe in self.pipelines]
        return [scheduler for scheduler in schedulers if hasattr(scheduler, "config")]

    def warn_of_sampling(self, names: Iterable[str]) -> None:
        """Warn once of each setting of a pipeline that does not suit a few-step adapter."""
        for name in names:
            config = self.configs[name]
            sampling = FewStepSampling.of(config)
            if sampling is None:
                continue
            for pipe in self.pipelines:
                settings = sampling.differences(pipe)
                if all(self._warned.get((name, setting)) is config for setting in settings):
                    continue
                self._warned |= {(name, setting): config for setting in settings}
                warnings.warn(
                    f"Adapter '{name}' was trained to sample in {sampling.num_inference_steps} steps, but the "
                    f"pipeline uses {', '.join(settings.values())}. Instead, run: {sampling.code}",
                    stacklevel=2,
                )
