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
from accelerate.utils import DistributedType
from PIL.Image import Image
from torch import Tensor

from nara_diffusion.dreambooth.adapter_files import adapter_loaded, write_adapter
from nara_diffusion.dreambooth.cache import LatentCache
from nara_diffusion.dreambooth.conversion import IdentityReading
from nara_diffusion.dreambooth.data.dataset import TrainingSample
from nara_diffusion.dreambooth.draws import draw_noise
from nara_diffusion.dreambooth.families.family import Family
from nara_diffusion.dreambooth.families.table import family_of
from nara_diffusion.dreambooth.objectives import Objective, squared_errors
from nara_diffusion.noise.window import EVERYTHING, NoiseWindow
from nara_diffusion.training.checkpoints import save_adapter
from nara_diffusion.training.engines import split_across_processes
from nara_diffusion.training.measures import before_and_after, validation_means
from nara_diffusion.training.run import Run

from .fidelity import Encoder, image_similarity, text_alignment
from .samples import SampleSettings, sample_images, write_grid

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """Attributes:
    images: samples, one for each (prompt, seed).
    similarity: of the samples to the subject's images, mean cosine; None without an encoder.
    text_alignment: of the samples to their prompts; None without an encoder.
    noise_levels, curve: λ, and the mean squared error there.
    validation_loss: its mean over λ.
    """

    images: list[Image]
    similarity: float | None
    text_alignment: float | None
    noise_levels: list[float]
    curve: list[float]
    validation_loss: float


@dataclass(frozen=True)
class Evaluator:
    """Encoders that say how good samples are.

    Attributes:
        references: images of the subject.
        images: what compares them with samples, or None.
        texts: what compares samples with prompts, or None.
        identifier: words left out of the prompts there, since no encoder knows them.
    """

    references: Sequence[Image]
    images: Encoder | None = None
    texts: Encoder | None = None
    identifier: Sequence[str] = ()

    @classmethod
    def of_run(cls, args: Any, references: Sequence[Image], device: torch.device) -> Evaluator:
        """With the encoders that a run's arguments name; one that both name is loaded once. Raises as `Encoder`."""
        names = {name for name in (args.similarity_model, args.alignment_model) if name is not None}
        encoders: dict[str | None, Encoder] = {n: Encoder(n, device=device) for n in sorted(names)}
        texts = encoders.get(args.alignment_model)
        if texts is not None:
            texts.check_text()
        return cls(references, encoders.get(args.similarity_model), texts, args.identifier or ())


@dataclass(frozen=True)
class ValidationLoss:
    """The objective without weights, at equally spaced noise levels, on the same noise at every call.

    Attributes:
        objective: built without min-SNR.
        latents: the cache.
        samples: images to measure on.
        seed: of the noise.
        points: noise levels.
        batch_size: images of one forward.
        window: of training; the loss is measured outside of it too.
        family: of the pipeline, with the conditions of the run; None takes its defaults.
        reading: how the pipeline's prediction is read as the objective's; None takes it as it is.
    """

    objective: Objective
    latents: LatentCache
    samples: Sequence[TrainingSample]
    seed: int
    points: int
    batch_size: int
    window: NoiseWindow = EVERYTHING
    family: Family | None = None
    reading: IdentityReading | None = None

    @property
    def indices(self) -> list[int]:
        """The middles of `points` equal parts of the schedule."""
        return [int((i + 0.5) * self.objective.levels / self.points) for i in range(self.points)]

    @torch.no_grad()
    def at(self, pipe: Any, index: int) -> list[float]:
        """The loss of each sample at noise level `index`, with whatever adapter `pipe` has, ordered by size."""
        family, reading = self.family or family_of(pipe), self.reading
        denoiser = getattr(pipe, family.denoiser)
        device, losses = denoiser.device, []
        for batch in self._batches():
            latents = self.latents.mode(batch)
            positions = [sample.position for sample in batch]
            noise = draw_noise(positions, latents.shape[1:], seed=self.seed, role="validation")
            indices = torch.full((len(batch),), index)
            corrupted = self.objective.corrupt(latents.to(device), noise.to(device), indices)
            seen = corrupted.model_input, corrupted.timestep
            embeddings = tuple(part.to(device) for part in family.encode(pipe, [sample.prompt for sample in batch]))
            time_ids = torch.tensor([sample.time_ids for sample in batch], device=device)
            inputs = seen if reading is None else reading.base_inputs(seen[0], indices)
            prediction = family.predict(denoiser, *inputs, time_ids, embeddings)
            if reading is not None:
                prediction = reading.prediction(seen[0], prediction, indices)
            losses += squared_errors(prediction, corrupted).tolist()
        return losses

    def levels(self) -> Tensor:
        """λ (points,)."""
        return self.objective.noise_levels[self.indices]

    def curve(self, pipe: Any, accelerator: Accelerator) -> Tensor:
        """(points, samples), on every process."""

        def work(points: Sequence[int]) -> list[list[float]]:
            return [self.at(pipe, self.indices[point]) for point in points]

        return torch.tensor(split_across_processes(accelerator, self.points, work))

    def _batches(self) -> list[list[TrainingSample]]:
        """Samples of one size each."""
        sizes = sorted({sample.target for sample in self.samples})
        of_size = [[sample for sample in self.samples if sample.target == size] for size in sizes]
        return [part[i : i + self.batch_size] for part in of_size for i in range(0, len(part), self.batch_size)]


@dataclass(frozen=True)
class Evaluation:
    """Measures `pipe`, which has no adapters, with those of a folder.

    Attributes:
        accelerator: accelerate's; all processes share the work.
        pipe: the base model's pipeline, which samples.
        settings: of the samples.
        loss, evaluator: what is measured.
    """

    accelerator: Accelerator
    pipe: Any
    settings: SampleSettings
    loss: ValidationLoss
    evaluator: Evaluator

    def measure(self, folder: Path | None, name: str) -> Measurement:
        """With the adapter in `folder`, loaded as a user loads it, or without one; `name` is for the progress bar."""
        with adapter_loaded(self.pipe, folder):
            images = sample_images(self.pipe, self.settings, self.accelerator, desc=f"sample {name}")
            curve = self.loss.curve(self.pipe, self.accelerator).mean(1)
        by, prompts = self.evaluator, [prompt for prompt, _ in self.settings.pairs]
        return Measurement(
            images=images,
            similarity=by.images and image_similarity(by.images, images, by.references),
            text_alignment=by.texts and text_alignment(by.texts, images, prompts, by.identifier),
            noise_levels=self.loss.levels().tolist(),
            curve=curve.tolist(),
            validation_loss=curve.mean().item(),
        )

    def identity_loss(self, loss: str) -> float:
        """The validation loss of a conversion's base, read by the identity; logged with that of the base as it is.

        Args:
            loss: what the log calls it, which says of which images it is.
        """
        read = replace(self.loss, reading=IdentityReading(self.pipe.scheduler, self.loss.objective))
        identity, as_it_is = (each.curve(self.pipe, self.accelerator).mean().item() for each in (read, self.loss))
        what = f"{loss} {identity:.3f}; as it is, where a new adapter starts: {as_it_is:.3f}"
        logger.info("the base, read by the identity (no training): %s", what)
        return identity


@dataclass(frozen=True)
class Validation:
    """`validation()` is what `train` calls: the figures to log, after a sheet of samples was written and logged.

    Attributes:
        run: of the training, opened.
        model: that is trained, as accelerate wrapped it.
        evaluation: of its adapters.
    """

    run: Run
    model: torch.nn.Module
    evaluation: Evaluation

    def __call__(self) -> dict[str, float]:
        accelerator = self.run.accelerator
        folder = self.run.folder / ".partial-validation"
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        folder.mkdir(exist_ok=True)
        try:
            save_adapter(accelerator, self.model, folder, write_adapter)
            with torch.random.fork_rng(devices):
                found = self.evaluation.measure(folder, "for validation")
            accelerator.wait_for_everyone()
        finally:
            if accelerator.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
        if accelerator.is_main_process:
            self._write(found.images)
        figures = {"similarity": found.similarity, "text_alignment": found.text_alignment}
        means = validation_means(
            torch.tensor(found.curve), torch.tensor(found.noise_levels), self.evaluation.loss.window
        )
        return means | {name: value for name, value in figures.items() if value is not None}

    def _write(self, images: Sequence[Image]) -> None:
        step, prompts = self.run.step, self.evaluation.settings.prompts
        path = self.run.folder / "validation" / f"step-{step}.png"
        path.parent.mkdir(exist_ok=True)
        write_grid(path, prompts, {f"step {step}": images}, self.evaluation.evaluator.references)
        galleries = np.split(np.stack([np.asarray(image) for image in images]), len(prompts))  # (n, h, w, 3) each
        shown = {f"validation: {prompt}": part for prompt, part in zip(prompts, galleries, strict=True)}
        for tracker in self.run.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(shown, step=step, **options)


def refuse_sharding(run: Run) -> None:
    """Sampling during training needs the whole model on each process."""
    kind = run.accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"this script trains where each device holds the whole model, and not with {kind.value}: launch it with "
            "--multi_gpu, and turn on gradient_checkpointing and mixed_precision bf16 if memory is short."
        )


def report_better_identity(identity: float, after: Measurement) -> None:
    """Log that the training reached less than the untrained base does by the identity, if so."""
    if identity < after.validation_loss:
        what = f"{identity:.3f}, is better than what the training reached, {after.validation_loss:.3f}"
        advice = "where no host needs the new form, read the base so and leave the adapter out (docs/conversion.md)"
        logger.info("the base read by the identity, %s: %s", what, advice)


def compare(before: Measurement, after: Measurement) -> dict[str, Any]:
    """Both measurements as results.json holds them, without the images."""
    return before_and_after(before, after, ("similarity", "text_alignment", "validation_loss", "curve"))
