"""What app.py does: a pipeline with adapters, three samples from the same noise, and the adapters' curves over λ."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure
from PIL import Image

from nara_diffusion import StrengthSchedule, core_matrix, noise_level
from nara_diffusion.noise.context import find_holders

LEVELS = torch.linspace(0, 1, 101)  # λ at which curves are drawn
Points = Sequence[tuple[float, float]]  # (λ, strength), as StrengthSchedule takes them
Progress = Callable[[float, str], None]
"""Called with the share that is done and what is being done."""
PRESETS: dict[str, Points] = {
    "early": [(0.0, 0.0), (0.4, 0.0), (0.6, 1.0), (1.0, 1.0)],
    "late": [(0.0, 1.0), (0.4, 1.0), (0.6, 0.0), (1.0, 0.0)],
    "window": [(0.0, 0.0), (0.3, 0.0), (0.3, 1.0), (0.7, 1.0), (0.7, 0.0), (1.0, 0.0)],
}
"""Curves by the part of the sampling in which the adapter is on; that goes from λ = 1 to 0."""

logger = logging.getLogger(__name__)


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
            ValueError: one of them can't be loaded, by its name; why is logged, since that may name files. The pipeline
                has no adapters then.
        """
        with self._turn:
            if model != self._model:
                self._model = self._pipe = self._base = None  # frees its memory before the next one takes some
                self._adapters = []
                self._pipe, self._model = _attempt(load_pipeline, model, "a pipeline"), model
            if [adapter.source for adapter in self._adapters] != list(sources):
                self._adapters = []
                self._pipe.unload_lora_weights()
                adapters: list[Adapter] = []
                try:
                    for number, source in enumerate(sources, start=1):
                        add_it = lambda place, n=number: add(self._pipe, place, f"adapter_{n}")  # noqa: E731
                        adapters.append(_attempt(add_it, source, "an adapter of this pipeline"))
                except BaseException:
                    self._pipe.unload_lora_weights()
                    raise
                self._adapters = adapters
            return self._adapters

    def sample(
        self, prompt: str, points: Sequence[Points], constant: float, progress: Progress, **call: Any
    ) -> list[Image.Image]:
        """Three samples from the same noise: without adapters, with them held at λ = `constant`, and with λ.

        Args:
            points: the strength of each adapter over λ.
            call: seed, num_inference_steps, guidance_scale, negative_prompt.
        """
        with self._turn:
            key = (prompt, *call.items())
            if self._base is None or self._base[0] != key:
                self._pipe.disable_lora()
                try:
                    self._base = key, self._draw(prompt, progress, "base", **call)
                finally:
                    self._pipe.enable_lora()
            names = [adapter.name for adapter in self._adapters]
            self._pipe.set_adapters(names, adapter_weights=[weight(curve) for curve in points])
            model = denoiser(self._pipe)
            with noise_level(model, constant) if find_holders(model) else nullcontext():
                at_one_level = self._draw(prompt, progress, f"adapter held at λ = {constant:g}", **call)
            return [self._base[1], at_one_level, self._draw(prompt, progress, "adapter with λ", **call)]

    def _draw(self, prompt: str, progress: Progress, what: str, seed: int, **call: Any) -> Image.Image:
        def step_done(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            progress((step + 1) / call["num_inference_steps"], what)
            return tensors

        generator = torch.Generator().manual_seed(seed)  # of the CPU: the same noise on every device
        return self._pipe(prompt, generator=generator, callback_on_step_end=step_done, **call).images[0]


def _attempt(load: Callable[[str], Any], source: str, what: str) -> Any:
    """What `load` returns for a folder, file or repository."""
    path = Path(source).expanduser()
    try:
        return load(str(path) if path.exists() else source)
    except (ValueError, OSError, ImportError, RuntimeError, KeyError) as error:
        logger.warning("%s: %s", source, error)
        raise ValueError(f"'{path.name}' can't be loaded as {what}: the terminal says why.") from error


def denoiser(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


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
    try:
        pipe.load_nara_weights(source, adapter_name=name)
    except ValueError as error:
        try:
            pipe.load_lora_weights(source, adapter_name=name)
        except Exception:
            raise error from None
        if name not in getattr(denoiser(pipe), "peft_config", {}):  # Diffusers only warns of keys that it skips
            raise error from None
        return Adapter(source, name, "LoRA: C(λ) = I", [0.0] * len(LEVELS), [(0.0, 1.0), (1.0, 1.0)])
    model = denoiser(pipe)
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


def draw_curves(adapters: Sequence[Adapter], points: Sequence[Points], constant: float) -> Figure:
    """A line for each adapter, in the order of sampling: above its strength with the points that make it, and the
    presets; below ‖C(λ) − I‖ / ‖I‖. A dashed line marks the `constant` λ."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for name, shape in PRESETS.items():
        above.plot(*zip(*shape, strict=True), ":", color="0.6", linewidth=1)
        on = [level for level, strength in shape if strength]
        above.text((min(on) + max(on)) / 2, 1.04, name, color="0.45", fontsize=9, ha="center")
    for adapter, curve in zip(adapters, points, strict=True):
        label = Path(adapter.source).name
        (line,) = above.plot(LEVELS, StrengthSchedule(curve).at(LEVELS), label=label, linewidth=2)
        above.plot(*zip(*curve, strict=True), "o", color=line.get_color(), markersize=4, clip_on=False)
        below.plot(LEVELS, adapter.distance, color=line.get_color(), linewidth=2)
    for axes in (above, below):
        axes.axvline(constant, color="0.3", linestyle="--", linewidth=1)
    low, high = above.get_ylim()
    above.set(ylabel="strength s(λ)", xlim=(1, 0), ylim=(low, max(1.15, high)))
    below.set(ylabel="core ‖C(λ) − I‖ / ‖I‖", xlabel="noise level λ: sampling goes from 1 (noise) to 0 (image)")
    if adapters:
        above.legend(loc="lower right", fontsize=8)
    return figure
