"""The figures before, during and after training: similarity, text alignment, and the loss over λ; on several processes.

Everything is measured on a pipeline into which the saved adapter was loaded as a user loads it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL.Image import Image
from torch import Tensor

from nara_diffusion.training.arguments import window_of
from nara_diffusion.training.checkpoints import save_adapter
from nara_diffusion.training.engines import split_across_processes
from nara_diffusion.training.report import validation_means
from nara_diffusion.training.run import Run
from nara_diffusion.utils.naming import is_out_of_reach

from .adapter_files import adapter_loaded, write_adapter
from .cache import LatentCache
from .conversion import IdentityReading
from .dataset import TrainingSample
from .draws import draw_noise
from .family import Family
from .fidelity import Encoder, image_similarity, text_alignment
from .objectives import Objective, squared_errors
from .samples import SampleSettings, sample_images, write_grid

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """Mean cosines are None without an encoder."""

    images: list[Image]  # samples, one for each (prompt, seed)
    similarity: float | None  # of the samples to the subject's images
    text_alignment: float | None  # of the samples to their prompts
    noise_levels: list[float]  # λ
    curve: list[float]  # the mean squared error there
    validation_loss: float  # its mean over λ


@dataclass(frozen=True)
class ValidationLoss:
    """The objective without weights, at equally spaced noise levels, on the same noise at every call."""

    objective: Objective  # with weights of 1
    latents: LatentCache
    samples: Sequence[TrainingSample]  # images to measure on
    family: Family  # with the conditions of the run
    seed: int  # of the noise
    points: int  # noise levels
    batch_size: int
    reading: IdentityReading | None = None  # how the pipeline's prediction is read as the objective's

    @property
    def indices(self) -> list[int]:
        """The middles of `points` equal parts of the schedule."""
        return [int((i + 0.5) * self.objective.levels / self.points) for i in range(self.points)]

    @property
    def noise_levels(self) -> Tensor:
        """λ (points,)."""
        return self.objective.noise_levels[self.indices]

    def curve(self, pipe: Any, accelerator: Accelerator) -> Tensor:
        """The loss (points, samples), with whatever adapter `pipe` has, samples ordered by size; on every process."""

        def work(points: Sequence[int]) -> list[list[float]]:
            return [self._at(pipe, self.indices[point]) for point in points]

        return torch.tensor(split_across_processes(accelerator, self.points, work))

    @torch.no_grad()
    def _at(self, pipe: Any, index: int) -> list[float]:
        denoiser, losses = getattr(pipe, self.family.denoiser), []
        device = denoiser.device
        for batch in self._batches():
            latents, indices = self.latents.mode(batch), torch.full((len(batch),), index)
            positions = [sample.position for sample in batch]
            noise = draw_noise(positions, latents.shape[1:], seed=self.seed, role="validation")
            corrupted = self.objective.corrupt(latents.to(device), noise.to(device), indices)
            embeddings = tuple(t.to(device) for t in self.family.encode(pipe, [sample.prompt for sample in batch]))
            time_ids = torch.tensor([sample.time_ids for sample in batch], device=device)
            seen, reading = corrupted.model_input, self.reading
            inputs = (seen, corrupted.timestep) if reading is None else reading.base_inputs(seen, indices)
            prediction = self.family.predict(denoiser, *inputs, time_ids, embeddings)
            if reading is not None:
                prediction = reading.prediction(seen, prediction, indices)
            losses += squared_errors(prediction, corrupted).tolist()
        return losses

    def _batches(self) -> list[list[TrainingSample]]:
        """Samples of one size each."""
        sizes = sorted({sample.target for sample in self.samples})
        of_size = [[sample for sample in self.samples if sample.target == size] for size in sizes]
        return [part[i : i + self.batch_size] for part in of_size for i in range(0, len(part), self.batch_size)]


@dataclass(frozen=True)
class Evaluation:
    """Measures `pipe`, which has no adapters, with those of a folder; all processes share the work."""

    run: Run
    pipe: Any  # the base model's pipeline, which samples
    settings: SampleSettings
    loss: ValidationLoss
    references: Sequence[Image] = ()  # images of the subject
    similarity: Encoder | None = None  # compares samples with the subject
    alignment: Encoder | None = None  # compares samples with their prompts

    def measure(self, folder: Path | None, name: str) -> Measurement:
        """With the adapter in `folder`, loaded as a user loads it, or without one; `name` is for the progress bar."""
        with adapter_loaded(self.pipe, folder):
            images = sample_images(self.pipe, self.settings, self.run.accelerator, desc=f"sample {name}")
            curve = self.loss.curve(self.pipe, self.run.accelerator).mean(1)
        prompts, unread = [prompt for prompt, _ in self.settings.pairs], self.run.args.identifier or ()
        return Measurement(
            images=images,
            similarity=self.similarity and image_similarity(self.similarity, images, self.references),
            text_alignment=self.alignment and text_alignment(self.alignment, images, prompts, unread),
            noise_levels=self.loss.noise_levels.tolist(),
            curve=curve.tolist(),
            validation_loss=curve.mean().item(),
        )

    def validate(self, model: torch.nn.Module) -> dict[str, float]:
        """The figures of `model` in training, as accelerate wrapped it, to log; a sheet of samples is written."""
        accelerator, folder = self.run.accelerator, self.run.folder / ".partial-validation"
        folder.mkdir(exist_ok=True)
        try:
            save_adapter(accelerator, model, folder, write_adapter)
            with torch.random.fork_rng([accelerator.device] if accelerator.device.type == "cuda" else []):
                found = self.measure(folder, "for validation")
            accelerator.wait_for_everyone()
        finally:
            if accelerator.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
        if accelerator.is_main_process:
            self._show(found.images)
        means = validation_means(torch.tensor(found.curve), self.loss.noise_levels, window_of(self.run.args))
        figures = {"similarity": found.similarity, "text_alignment": found.text_alignment}
        return means | {name: value for name, value in figures.items() if value is not None}

    def _show(self, images: Sequence[Image]) -> None:
        step, prompts = self.run.step, self.settings.prompts
        path = self.run.folder / "validation" / f"step-{step}.png"
        path.parent.mkdir(exist_ok=True)
        write_grid(path, prompts, {f"step {step}": images}, self.references)
        galleries = np.split(np.stack([np.asarray(image) for image in images]), len(prompts))  # (n, h, w, 3) each
        shown = {f"validation: {prompt}": part for prompt, part in zip(prompts, galleries, strict=True)}
        for tracker in self.run.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(shown, step=step, **options)

    def identity_loss(self, loss: str) -> float:
        """The validation loss of a conversion's base, read by the identity; logged as `loss`, with that of the base as
        it is."""
        read = replace(self.loss, reading=IdentityReading(self.pipe.scheduler, self.loss.objective))
        identity, as_it_is = (each.curve(self.pipe, self.run.accelerator).mean().item() for each in (read, self.loss))
        what = f"{loss} {identity:.3f}; as it is, where a new adapter starts: {as_it_is:.3f}"
        logger.info("the base, read by the identity (no training): %s", what)
        return identity


def load_encoders(args: Any, device: torch.device) -> dict[str, Encoder | None]:
    """The encoders of an `Evaluation` that a run's arguments name; one that both name is loaded once."""
    names = {name for name in (args.similarity_model, args.alignment_model) if name is not None}
    encoders: dict[str | None, Encoder] = {name: _load_encoder(args, name, device) for name in sorted(names)}
    alignment = encoders.get(args.alignment_model)
    if alignment is not None:
        alignment.check_text()
    return {"similarity": encoders.get(args.similarity_model), "alignment": alignment}


def _load_encoder(args: Any, name: str, device: torch.device) -> Encoder:
    try:
        return Encoder(name, device=device)
    except OSError as error:
        flags = [flag for flag in ("similarity_model", "alignment_model") if getattr(args, flag) == name]
        why, without = str(error).strip().partition("\n")[0], "--similarity_model none --alignment_model none"
        if is_out_of_reach(error):
            why = "the Hub can't be reached"
            without += " --pretrained_vae_model_name_or_path none" * bool(args.pretrained_vae_model_name_or_path)
        raise ValueError(
            f"--{' and --'.join(flags)} {name} can't be loaded ({why}): name a folder, or train without these figures "
            f"by {without}."
        ) from error
