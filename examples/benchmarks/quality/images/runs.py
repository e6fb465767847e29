"""One run of the image benchmark: a subject, a method, a seed → its records.

Order, noise and timesteps are functions of the seed, not of the method.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from nara_diffusion.dreambooth import collate_samples
from nara_diffusion.dreambooth.dataset import DreamBoothDataset
from nara_diffusion.dreambooth.image_records import ImageRecord
from nara_diffusion.dreambooth.objectives import build_objective
from nara_diffusion.dreambooth.training_step import TrainingStep
from quality.images.held_out import (
    BACKBONE,
    SIZE,
    Shown,
    base,
    bin_centres,
    clean_bins,
    held_out_losses,
    pictures_of,
)
from quality.images.samples import judged_samples
from quality.images.training import DEFAULTS, ControlledDenoiser, adapted, arguments, shuffled_noise_levels
from quality.running import BASE, Job, Settings, Suite, optimize, records_of


def loss_of(
    subject: str, denoiser: ControlledDenoiser, args: Any, pictures: list[ImageRecord] | None = None
) -> Callable[[int], Tensor]:
    """The loss of step `number`: data, timesteps and noise follow from the seed and the number alone.

    Args:
        pictures: of the subject; None for all five.
    """
    size = args.train_batch_size
    dataset = DreamBoothDataset(
        pictures or pictures_of(subject), [SIZE], batch_size=size, seed=args.seed, flip=args.random_flip
    )
    step = TrainingStep(
        model=denoiser,
        objective=build_objective(base().pipe.scheduler, snr_gamma=args.snr_gamma),
        latents=base().latents,
        prompts=base().prompts,
        device=torch.device("cpu"),
        seed=args.seed,
        group_size=size,
        stratified=args.stratified_timesteps,
        noise_offset=args.noise_offset,
    )

    def loss(number: int) -> Tensor:
        positions = range(number * size, (number + 1) * size)
        denoiser.shuffled = shuffled_noise_levels(positions, args.seed, step.objective.levels, size)
        return step(collate_samples([dataset[position] for position in positions])).loss

    return loss


@cache
def held_out(subject: str) -> list[Shown]:
    """One batch a bin of λ, as the base's own objective shows them."""
    objective = build_objective(base().pipe.scheduler)
    return [clean.corrupted(objective) for clean in clean_bins(subject)]


def _measure(subject: str, unet: Any, args: Any) -> dict[str, Any]:
    losses = [held_out_losses(unet, noisy).mean().item() for noisy in held_out(subject)]
    figures = {"noise_levels": bin_centres(), "losses": losses, "validation_loss": sum(losses) / len(losses)}
    return figures | judged_samples(subject, unet, args)


def run(job: Job, settings: Settings) -> list[dict[str, Any]]:
    """The records of `job`, whose backbone is the only one that there is; `settings` are the script's arguments."""
    args = arguments(job.domain, job.method, job.seed, settings)
    started = time.perf_counter()
    torch.manual_seed(job.seed)
    unet = adapted(job.method, args)
    if job.method != BASE:
        denoiser = ControlledDenoiser(unet, job.control)
        optimize(denoiser, loss_of(job.domain, denoiser, args), args)
    measure = partial(_measure, job.domain, unet, args)
    return records_of(job, args, {**DEFAULTS, **settings}, unet, measure, started)


SUITE = Suite("images", (BACKBONE,), ("toy", "car", "cup"), run)
