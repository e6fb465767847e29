"""Compare how adapters are used with how they were trained.

`NaraConfig` records what a scheduler has to expect (`scheduler`), how an adapter for few steps is
sampled (`few_steps`), and whether training had a λ for each sample or for each part of a sample
(`noise_level_per`). A scheduler that expects another prediction is an error. For the other two
there is a warning, once for each adapter.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.noise.prediction import check_expected, other_sampling

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

_KINDS = {"sample": "sample", "part": "part of a sample (a frame, a block)"}
"""`NaraConfig.noise_level_per` → its name in messages."""


class Usage:
    """How the adapters of one model are used.

    Args:
        configs: adapter → configuration. The holder of the cores owns this dict and changes it in
            place.

    Attributes:
        pipelines: weak references to the pipelines that loaded adapters.
    """

    def __init__(self, configs: dict[str, LoraConfig]) -> None:
        self.configs = configs
        self.pipelines: list[weakref.ref[DiffusionPipeline]] = []
        self._warned_of_sampling: set[str] = set()
        self._warned_of_parts: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pipelines": []}  # a copy has no pipelines

    # ------------------------------------------------------------------ the pipelines' schedulers

    def add_pipeline(self, pipe: DiffusionPipeline) -> None:
        """Remember a pipeline that loaded an adapter."""
        self.pipelines = [ref for ref in self.pipelines if ref() not in (None, pipe)]
        self.pipelines.append(weakref.ref(pipe))

    def schedulers(self) -> list[SchedulerMixin]:
        """Return the present schedulers of the pipelines that loaded adapters."""
        found = []
        for reference in self.pipelines:
            scheduler = getattr(reference(), "scheduler", None)
            if hasattr(scheduler, "config"):
                found.append(scheduler)
        return found

    def check_prediction(self, names: Iterable[str]) -> None:
        """Raise ValueError if a pipeline's scheduler does not fit the prediction of an adapter.

        Warn once if a pipeline samples an adapter for few steps in another way.
        """
        for name in names:
            self._warn_of_sampling(name)
            fields = getattr(self.configs[name], "scheduler", None)
            if fields is not None:
                for scheduler in self.schedulers():
                    check_expected(scheduler, fields)

    def _warn_of_sampling(self, name: str) -> None:
        few_steps = getattr(self.configs[name], "few_steps", None)
        if few_steps is None or name in self._warned_of_sampling:
            return
        for reference in self.pipelines:
            pipe = reference()
            difference = None if pipe is None else other_sampling(pipe, few_steps)
            if difference is not None:
                self._warned_of_sampling.add(name)
                warnings.warn(
                    f"Adapter '{name}' was trained to sample in {few_steps['num_inference_steps']} steps, but the "
                    f"pipeline takes {difference}",
                    stacklevel=2,
                )

    # ------------------------------------------------------------------ samples or their parts

    def note_parts(
        self, root: nn.Module, names: Iterable[str], level: Tensor, is_for_all: bool
    ) -> None:
        """Record if training gives λ to samples or to their parts; warn once of the other use.

        An adapter that was trained with both counts as trained with λ of parts.

        Args:
            root: the adapted model.
            names: the adapters that depend on λ.
            level: λ (b,) of samples, or (b, k) of their k parts.
            is_for_all: True for one λ of a context for all samples, which fits both.
        """
        now = "part" if level.dim() == 2 else "sample"
        for name in names:
            config = self.configs[name]
            if not isinstance(config, NaraConfig) or config.noise_level_per == now:
                continue
            before = config.noise_level_per
            if before is not None and not is_for_all and name not in self._warned_of_parts:
                self._warned_of_parts.add(name)
                warnings.warn(
                    f"Adapter '{name}' was trained with λ for each {_KINDS[before]}, and this forward has one for "
                    f"each {_KINDS[now]}, which it has not seen: its results may be worse.",
                    UserWarning,
                    stacklevel=2,
                )
            if root.training and torch.is_grad_enabled() and before != "part":
                config.noise_level_per = now
