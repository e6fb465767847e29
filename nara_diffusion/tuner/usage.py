"""Compare how the adapters of a model are used with how they were trained."""

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


_KINDS = {"sample": "sample", "part": "part of a sample (a frame, a block)"}
"""`NaraConfig.noise_level_per` → its name in messages."""


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
            sampling = FewStepSampling.of(config)
            if sampling is None:
                continue
            for reference in self.pipelines:
                pipe = reference()
                settings = {} if pipe is None else sampling.differences(pipe)
                if all(warned.get((name, setting)) is config for setting in settings):
                    continue
                warned |= {(name, setting): config for setting in settings}
                warnings.warn(
                    f"Adapter '{name}' was trained to sample in {sampling.num_inference_steps} steps, but the "
                    f"pipeline uses {', '.join(settings.values())}. Instead, run: {sampling.code}",
                    stacklevel=2,
                )

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
                f"Adapter '{name}' was trained with one λ for each {_KINDS[trained]}. This forward has one for each "
                f"{_KINDS[per]}, which the adapter hasn't seen, so its results may be worse.",
                UserWarning,
                stacklevel=2,
            )
