"""What app.py does: a pipeline with adapters, samples without and with them from the same noise, and their curves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure
from PIL import Image

from nara_diffusion import StrengthSchedule, core_matrix

LEVELS = torch.linspace(0, 1, 101)  # λ at which curves are drawn
Points = Sequence[tuple[float, float]]  # (λ, strength), as StrengthSchedule takes them
Progress = Callable[[float, str], None]
"""Called with the share that is done and what is being done."""


@dataclass(frozen=True)
class Adapter:
    """Attributes:
    source: as the user named it.
    name: in the pipeline.
    summary: what it is, in a line.
    distance: ‖C(λ) − I‖ / √r at LEVELS; zeros for a LoRA.
    points: the strength that it brings.
    """

    source: str
    name: str
    summary: str
    distance: list[float]
    points: Points


class Session:
    """Keeps the last pipeline with its adapters, and the last sample without them. One call at a time: others wait."""

    def __init__(self) -> None:
        self._turn = threading.RLock()
        self._model: str | None = None
        self._pipe: Any = None
        self._adapters: list[Adapter] = []
        self._base: tuple[Any, Image.Image] | None = None

    def load(self, model: str, sources: Sequence[str]) -> list[Adapter]:
        """The pipeline of a folder or repository, with these adapters: files, folders or repositories.

        Raises:
            ValueError, OSError: nothing is there, or it doesn't fit; the pipeline has no adapters then.
        """
        with self._turn:
            if model != self._model:
                self._model = self._pipe = self._base = None  # frees its memory before the next one takes some
                self._adapters = []
                self._pipe, self._model = load_pipeline(model), model
            if [adapter.source for adapter in self._adapters] != list(sources):
                self._adapters = []
                self._pipe.unload_lora_weights()
                try:
                    found = [add(self._pipe, source, f"adapter_{n}") for n, source in enumerate(sources, start=1)]
                except BaseException:
                    self._pipe.unload_lora_weights()
                    raise
                self._adapters = found
            return self._adapters

    def sample(self, prompt: str, points: Sequence[Points], progress: Progress, **call: Any) -> list[Image.Image]:
        """Two samples from the same noise: without adapters, and with these strengths over λ.

        Args:
            call: seed, num_inference_steps, guidance_scale, negative_prompt.
        """
        with self._turn:
            key = (prompt, *call.items())
            if self._base is None or self._base[0] != key:
                self._pipe.disable_lora()
                try:
                    self._base = key, self._draw(prompt, progress, "without adapters", **call)
                finally:
                    self._pipe.enable_lora()
            names = [adapter.name for adapter in self._adapters]
            self._pipe.set_adapters(names, adapter_weights=[weight(own) for own in points])
            return [self._base[1], self._draw(prompt, progress, "with adapters", **call)]

    def _draw(self, prompt: str, progress: Progress, what: str, seed: int, **call: Any) -> Image.Image:
        def step_done(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            progress((step + 1) / call["num_inference_steps"], what)
            return tensors

        generator = torch.Generator().manual_seed(seed)  # of the CPU: the same noise on every device
        return self._pipe(prompt, generator=generator, callback_on_step_end=step_done, **call).images[0]


def load_pipeline(name: str) -> Any:
    """On a GPU in bfloat16, else on the CPU in float32."""
    index: Any = DiffusionPipeline.load_config(name)
    # Diffusers fails for models that the folder lacks, such as SD3's T5, unless they are passed as None
    absent = {part: None for part, classes in index.items() if classes == [None, None]}
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = DiffusionPipeline.from_pretrained(name, dtype=dtype, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def add(pipe: Any, source: str, name: str) -> Adapter:
    """Load a NaRA, or else a LoRA that Diffusers reads, into the pipeline."""
    path = str(Path(source).expanduser()) if Path(source).expanduser().exists() else source
    try:
        pipe.load_nara_weights(path, adapter_name=name)
    except ValueError as error:
        try:
            pipe.load_lora_weights(path, adapter_name=name)
        except Exception:
            raise error from None
        return Adapter(source, name, "LoRA: C(λ) = I", [0.0] * len(LEVELS), [(0.0, 1.0), (1.0, 1.0)])
    model = getattr(pipe, "unet", None) or pipe.transformer
    config = model.peft_config[name]
    layers = [layer for layer, module in model.named_modules() if name in getattr(module, "lora_A", {})]
    with torch.no_grad():
        C = core_matrix(model, LEVELS, name, module=layers[0]).expand(len(LEVELS), -1, -1).float().cpu()
    distance = (C - torch.eye(C.shape[-1])).flatten(1).norm(dim=1) / C.shape[-1] ** 0.5
    points = StrengthSchedule(config.strength or [(0.0, 1.0), (1.0, 1.0)]).points
    summary = f"NaRA: core {config.core_type}, rank {config.r}, {len(layers)} layers"
    return Adapter(source, name, summary, distance.tolist(), points)


def weight(points: Points) -> float | StrengthSchedule:
    """The value of `set_adapters`' adapter_weights; a number where the strength is the same for all λ, which holds for
    text encoders too: those run before there is a λ."""
    strengths = {strength for _, strength in points}
    return strengths.pop() if len(strengths) == 1 else StrengthSchedule(points)


def draw_curves(adapters: Sequence[Adapter], points: Sequence[Points]) -> Figure:
    """A line for each adapter: left ‖C(λ) − I‖ / ‖I‖, right its strength with the points that make it."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for adapter, own in zip(adapters, points, strict=True):
        left.plot(LEVELS, adapter.distance, label=adapter.name)
        (line,) = right.plot(LEVELS, StrengthSchedule(own).at(LEVELS), label=adapter.name)
        right.plot(*zip(*own, strict=True), "o", color=line.get_color(), markersize=4, clip_on=False)
    left.set(title="core", ylabel="‖C(λ) − I‖ / ‖I‖", xlabel="noise level λ (1 = pure noise)", xlim=(0, 1))
    right.set(title="strength", ylabel="s(λ)", xlabel="noise level λ (1 = pure noise)", xlim=(0, 1))
    return figure
