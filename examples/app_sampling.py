"""Samples of a pipeline without and with adapters, from the same noise: what app.py shows side by side."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from app_adapters import Adapter, Points, check_repository_name, load, weight
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image

Progress = Callable[[float, str], None]
"""Called with the share that is done and what is being done."""


@dataclass(frozen=True)
class Call:
    """What a sample depends on beside the adapters.

    Attributes:
    model: a pipeline's folder or repository. guidance: the scale of classifier-free guidance.
    """

    model: str
    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 25
    guidance: float = 4.0


class Sampler:
    """Keeps the last pipeline, and the last sample without adapters. One call at a time: later ones wait."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._name: str | None = None
        self._pipe: Any = None
        self._base: tuple[Call, Image.Image] | None = None

    def before_and_after(
        self, call: Call, adapters: list[tuple[Adapter, Points]], progress: Progress = lambda share, what: None
    ) -> tuple[Image.Image, Image.Image]:
        """Samples without and with the adapters, each with its strength over λ, from the same noise.

        Raises:
            ValueError: a number out of range, no adapter, or one that doesn't fit. OSError: no pipeline is there.
        """
        _check(call, adapters)
        with self._turn:
            pipe = self._pipeline(call.model, progress)
            after = _with_adapters(pipe, call, adapters, progress)
            if self._base is None or self._base[0] != call:
                self._base = call, _sample(pipe, call, progress, "without adapters")
            return self._base[1], after

    def _pipeline(self, name: str, progress: Progress) -> Any:
        if name != self._name:
            progress(0.0, "loading the pipeline")
            self._name = self._pipe = self._base = None  # frees its memory before the next one takes some
            self._pipe = load_pipeline(name)
            self._name = name
        return self._pipe


def load_pipeline(name: str) -> Any:
    """The pipeline of a folder or repository: on a GPU in bfloat16, else on the CPU in float32.

    Raises:
        ValueError: no repository can have that name. OSError: nothing is there, or no pipeline.
    """
    index: Any = {}
    if Path(name).exists():
        index = DiffusionPipeline.load_config(name)
    else:
        check_repository_name(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Diffusers fails for models that the folder lacks, such as SD3's T5, unless they are passed as None
    absent = {part: None for part, classes in index.items() if classes == [None, None]}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(name, dtype=dtype, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _check(call: Call, adapters: list[tuple[Adapter, Points]]) -> None:
    if not call.model.strip():
        raise ValueError("No pipeline is named: enter a folder or a repository.")
    if not adapters:
        raise ValueError("No adapter is named: enter one a line, a file, a folder or a repository.")
    if call.steps < 1:
        raise ValueError(f"steps is {call.steps}, expected at least 1.")
    if not 0 <= call.seed < 2**63:
        raise ValueError(f"seed is {call.seed}, expected an integer from 0 to 2⁶³ − 1.")


def _with_adapters(pipe: Any, call: Call, adapters: list[tuple[Adapter, Points]], progress: Progress) -> Image.Image:
    """The pipeline is as before afterwards, whatever happens."""
    names = [f"adapter_{number}" for number in range(1, len(adapters) + 1)]
    try:
        for name, (adapter, _) in zip(names, adapters, strict=True):
            load(pipe, adapter, name)
        weights = [weight(pipe, name, points) for name, (_, points) in zip(names, adapters, strict=True)]
        pipe.set_adapters(names, adapter_weights=weights)
        return _sample(pipe, call, progress, "with adapters")
    finally:
        pipe.unload_nara_weights()


def _sample(pipe: Any, call: Call, progress: Progress, what: str) -> Image.Image:
    options: dict[str, Any] = {"num_inference_steps": call.steps, "guidance_scale": call.guidance}
    if call.negative_prompt:
        options["negative_prompt"] = call.negative_prompt
    known = inspect.signature(pipe.__call__).parameters
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"{type(pipe).__name__} doesn't know {', '.join(unknown)}: choose another pipeline.")

    def step_done(_: Any, step: int, __: Any, ___: Any) -> dict[str, Any]:
        progress((step + 1) / call.steps, what)
        return {}

    if "callback_on_step_end" in known:
        options["callback_on_step_end"] = step_done
    generator = torch.Generator().manual_seed(call.seed)  # of the CPU: the same noise on every device
    images = getattr(pipe(call.prompt, generator=generator, **options), "images", None)
    if not images:
        raise ValueError(f"{type(pipe).__name__} makes no images: choose a pipeline that makes some.")
    return images[0]
