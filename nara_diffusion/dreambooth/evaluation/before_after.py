"""The figures before and after training: similarity, text alignment, and the loss over λ; on several processes.

Everything is measured on a pipeline into which the saved adapter was loaded as a user loads it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL.Image import Image
from torch import Tensor

from nara_diffusion.dreambooth.cache.latents import LatentCache
from nara_diffusion.dreambooth.data.dataset import TrainingSample
from nara_diffusion.dreambooth.families.family import Family
from nara_diffusion.dreambooth.families.table import family_of
from nara_diffusion.dreambooth.formats import adapter_loaded
from nara_diffusion.dreambooth.objectives import IdentityReading, Objective, squared_errors
from nara_diffusion.dreambooth.objectives.timesteps import draw_noise
from nara_diffusion.noise.window import EVERYTHING, NoiseWindow
from nara_diffusion.training.engine.distributed import split_across_processes
from nara_diffusion.training.metrics import before_and_after, validation_means

from .encoders import Encoder
from .metrics import ImageSimilarity, TextAlignment, without_words
from .sampling import SampleSettings, sample_images

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

    def similarity(self, samples: Sequence[Image]) -> float | None:
        return None if self.images is None else ImageSimilarity(self.images).similarity(samples, self.references)

    def alignment(self, samples: Sequence[Image], prompts: Sequence[str]) -> float | None:
        if self.texts is None:
            return None
        return TextAlignment(self.texts).alignment(samples, [without_words(p, self.identifier) for p in prompts])


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
        """The loss of each sample at noise level `index`, with whatever adapter `pipe` has."""
        family = family_of(pipe) if self.family is None else self.family
        denoiser = getattr(pipe, family.denoiser)
        device = denoiser.device
        losses: list[float] = []
        for batch in self._batches():
            latents = self.latents.mode(batch)
            noise = draw_noise(
                [sample.position for sample in batch], latents.shape[1:], seed=self.seed, role="validation"
            )
            indices = torch.full((len(batch),), index, device=device)
            corrupted = self.objective.corrupt(latents.to(device), noise.to(device), indices)
            embeddings = tuple(part.to(device) for part in family.encode(pipe, [sample.prompt for sample in batch]))
            time_ids = torch.tensor([sample.crop.time_ids for sample in batch], device=device)
            seen = corrupted.model_input, corrupted.timestep
            if self.reading is not None:
                seen = self.reading.base_inputs(corrupted.model_input, indices)
            prediction = family.predict(denoiser, *seen, time_ids, embeddings)
            if self.reading is not None:
                prediction = self.reading.prediction(corrupted.model_input, prediction, indices)
            losses += squared_errors(prediction, corrupted).tolist()
        return losses

    def levels(self) -> Tensor:
        """λ (points,)."""
        latents = self.latents.mode(self.samples[:1]).expand(self.points, -1, -1, -1)
        timestep = self.objective.corrupt(latents, latents, torch.tensor(self.indices)).timestep
        return self.objective.source.noise_level(timestep)

    def curve(self, pipe: Any, accelerator: Accelerator) -> Tensor:
        """(points, samples), on every process."""

        def work(points: Sequence[int]) -> list[list[float]]:
            return [self.at(pipe, self.indices[point]) for point in points]

        return torch.tensor(split_across_processes(accelerator, self.points, work))

    def _batches(self) -> list[list[TrainingSample]]:
        """Samples of one size each."""
        batches: list[list[TrainingSample]] = []
        for sample in sorted(self.samples, key=lambda sample: sample.target_size):
            if not batches or len(batches[-1]) == self.batch_size or batches[-1][0].target_size != sample.target_size:
                batches.append([])
            batches[-1].append(sample)
        return batches


def measure(
    accelerator: Accelerator,
    pipe: Any,
    folder: Path | None,
    settings: SampleSettings,
    validation: ValidationLoss,
    evaluator: Evaluator,
    name: str,
) -> Measurement:
    """Samples and losses of `pipe` with the adapter in `folder`, or without one; `name` is for the progress bar."""
    with adapter_loaded(pipe, folder):
        images = sample_images(pipe, settings, accelerator, desc=f"sample {name}")
        curve = validation.curve(pipe, accelerator).mean(1)
    return Measurement(
        images=images,
        similarity=evaluator.similarity(images),
        text_alignment=evaluator.alignment(images, [prompt for prompt, _ in settings.pairs]),
        noise_levels=validation.levels().tolist(),
        curve=curve.tolist(),
        validation_loss=curve.mean().item(),
    )


def validation_losses(accelerator: Accelerator, pipe: Any, validation: ValidationLoss) -> dict[str, float]:
    """{"validation_loss", "validation_loss_low", …} of `pipe` as it is; with a window the means of both sides too."""
    losses = validation.curve(pipe, accelerator)  # (points, samples)
    levels = validation.levels().repeat_interleave(losses.shape[1])
    return validation_means(losses.flatten(), levels, validation.window)


def identity_loss(accelerator: Accelerator, pipe: Any, validation: ValidationLoss, loss: str) -> float:
    """The validation loss of a conversion whose base, `pipe`, is read by the identity; logged beside that of the base
    as it is.

    Args:
        loss: what the log calls it, which says of which images it is.
    """
    read = replace(validation, reading=IdentityReading(pipe.scheduler, validation.objective))
    identity, as_it_is = (each.curve(pipe, accelerator).mean().item() for each in (read, validation))
    logger.info(
        "the base, read by the identity (no training): %s %.3f; as it is, where a new adapter starts: %.3f",
        loss,
        identity,
        as_it_is,
    )
    return identity


def report_better_identity(identity: float, after: Measurement) -> None:
    """Log that the training reached less than the untrained base does by the identity, if so."""
    if identity < after.validation_loss:
        logger.info(
            "the base read by the identity, %.3f, is better than what the training reached, %.3f: where no host needs "
            "the new form, read the base so and leave the adapter out (docs/conversion.md)",
            identity,
            after.validation_loss,
        )


def compare(before: Measurement, after: Measurement) -> dict[str, Any]:
    """Both measurements as results.json holds them, without the images."""
    return before_and_after(before, after, ("similarity", "text_alignment", "validation_loss", "curve"))
