"""The task of a run, and what is measured before, during and after it: fidelity, the loss over λ.

The metrics are defined in `encoders`. A run loads the saved adapter into a pipeline as a user
would, and measures that pipeline. All processes share the work. `examples/subject_metrics.py`
measures the folders of several seeds.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from peft import PeftConfig
from PIL.Image import Image
from torch.utils.data import Dataset

from nara_diffusion.training.arguments import window_of
from nara_diffusion.training.checkpoints import save_adapter
from nara_diffusion.training.report import validation_means
from nara_diffusion.training.run import Run

from .denoiser import adapter_loaded, write_adapter
from .encoders import Encoder, Images, image_similarity, paired_similarity, text_alignment
from .families import Family
from .few_steps import StudentLoss
from .samples import SampleSettings, sample_images, write_grid
from .training_step import TrainingStep, ValidationLoss

logger = logging.getLogger(__name__)

STRIP = "samples-by-step.png"


@dataclass(frozen=True)
class Measurement:
    """The figures of one measurement. A mean cosine is None if its encoder is missing."""

    images: list[Image]  # samples, one for each (prompt, seed)
    similarity: float | None  # of the samples and the subject's images
    text_alignment: float | None  # of the samples and their prompts
    noise_levels: list[float]  # λ
    curve: list[float]  # the mean squared error there
    validation_loss: float  # its mean over λ


@dataclass(frozen=True)
class Evaluation:
    """Measure the base pipeline `pipe` with saved adapters. All processes share the work."""

    run: Run
    pipe: DiffusionPipeline  # the pipeline of the base model, for sampling
    settings: SampleSettings
    loss: ValidationLoss | StudentLoss
    references: Sequence[Image] = ()  # images of the subject, or of a teacher
    similarity: Encoder | None = None  # compares samples with the subject
    alignment: Encoder | None = None  # compares samples with their prompts
    has_teacher: bool = False  # whether each sample has a teacher's sample in `references`
    sources: Sequence[Image] = ()  # the image that each prompt edits to `references`
    # by optimizer step; between the start and the end with one sample per prompt
    history: dict[int, Measurement] = field(default_factory=dict)

    def measure(
        self, folder: Path | None, name: str, settings: SampleSettings | None = None
    ) -> Measurement:
        """Return a measurement with the adapter in `folder`, loaded as a user would load it.

        The global random state doesn't change.

        Args:
            folder: the adapter's folder; None means the base model.
            name: the title of the progress bar.
            settings: of the samples; by default those of the evaluation.
        """
        accelerator, settings = self.run.accelerator, settings or self.settings
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices), adapter_loaded(self.pipe, folder):
            images = sample_images(self.pipe, settings, accelerator, desc=f"sample {name}")
            curve = self.loss.curve(self.pipe, accelerator).mean(1)
        return Measurement(
            images=images,
            similarity=self._similarity(images),
            text_alignment=self._alignment(images),
            noise_levels=self.loss.noise_levels.tolist(),
            curve=curve.tolist(),
            validation_loss=curve.mean().item(),
        )

    def _alignment(self, images: Sequence[Image]) -> float | None:
        """Return the alignment with the prompts; None without an encoder."""
        if self.alignment is None:
            return None
        per_prompt = len(images) // len(self.settings.prompts)
        prompts = [prompt for prompt in self.settings.prompts for _ in range(per_prompt)]
        return text_alignment(self.alignment, images, prompts, self.run.args.identifier or ())

    def _similarity(self, images: Images) -> float | None:
        """Return the similarity to the references; None without an encoder."""
        if self.similarity is None:
            return None
        if not (self.has_teacher or self.sources):
            return image_similarity(self.similarity, images, self.references)
        step = len(self.references) // len(images)
        return paired_similarity(self.similarity, images, self.references[::step])

    def measure_model(
        self, model: torch.nn.Module, name: str, settings: SampleSettings | None = None
    ) -> Measurement:
        """Return a measurement of `model`, with or without accelerate's wrapper.

        Its adapter is saved, loaded as a user would load it (see `measure`), and deleted.
        """
        accelerator, folder = self.run.accelerator, self.run.folder / ".partial-adapter"
        folder.mkdir(exist_ok=True)
        try:
            save_adapter(accelerator, model, folder, write_adapter)
            measurement = self.measure(folder, name, settings)
            accelerator.wait_for_everyone()
        finally:
            if accelerator.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
        return measurement

    def validate(self, model: torch.nn.Module) -> dict[str, float]:
        """Return the figures of `model`, as wrapped by accelerate, and write the strip of samples.

        Before the last step, they are those of one sample per prompt.
        """
        is_last = self.run.step == self.run.total_steps
        settings = self.settings if is_last else replace(self.settings, images_per_prompt=1)
        measurement = self.measure_model(model, "for validation", settings)
        curve, window = torch.tensor(measurement.curve), window_of(self.run.args)
        values = validation_means(curve, self.loss.noise_levels, window)
        for name in ("similarity", "text_alignment"):
            figure = getattr(measurement, name)
            if figure is not None:
                values[name] = figure
        self.record(self.run.step, measurement)
        if self.run.is_main:
            text = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
            logger.info("step %d: %s", self.run.step, text)
        return values

    def write_sheet(self, path: Path, columns: Mapping[str, Sequence[Image]]) -> None:
        """Write a sheet of samples with the subject, or with the source and target of each row."""
        prompts, number = self.settings.prompts, self.settings.images_per_prompt
        if self.sources:
            targets = self.references[::number]
            write_grid(path, prompts, {"source": self.sources, **columns, "target": targets})
        else:
            title = "the teacher" if self.has_teacher else "training images"
            write_grid(path, prompts, columns, {title: self.references})

    def first_samples(self, measurement: Measurement) -> list[Image]:
        """Return the first sample of each prompt, which every measurement has."""
        return measurement.images[:: len(measurement.images) // len(self.settings.prompts)]

    def record(self, step: int, measurement: Measurement) -> None:
        """Add a measurement to the history, its samples to the strip, and pass it to trackers."""
        self.history[step] = measurement
        if not self.run.is_main:
            return
        columns = {f"step {step}": self.first_samples(m) for step, m in self.history.items()}
        self.write_sheet(self.run.folder / STRIP, columns)
        strips = {  # (steps, h, w, 3)
            f"validation: {prompt}": np.stack(images)
            for prompt, *images in zip(self.settings.prompts, *columns.values(), strict=True)
        }
        for tracker in self.run.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(strips, step=step, **options)

    def trend(self) -> list[tuple[int, float, float]]:
        """Return (step, similarity, alignment) of the first samples; empty without the encoders."""
        images = {step: self.first_samples(self.history[step]) for step in sorted(self.history)}
        rows = [(step, self._similarity(x), self._alignment(x)) for step, x in images.items()]
        return [(step, a, b) for step, a, b in rows if a is not None and b is not None]


@dataclass(frozen=True)
class Task:
    """A base model without its adapter, with samples, a loss and an evaluation."""

    pipe: DiffusionPipeline
    family: Family  # with the settings of the run
    config: PeftConfig  # of the adapter
    loss: TrainingStep | StudentLoss
    samples: Dataset  # indexed by position, as a `ShuffledStream`
    collate: Callable[[list], Any]  # samples → a batch of `loss`
    count: int  # samples of an epoch
    evaluation: Evaluation
    facts: Mapping[str, str]  # {what: value} for the log and the model card
    # measurements before and after → more arguments of `training.report.finish`
    report: Callable[[Measurement, Measurement], dict[str, Any]]
