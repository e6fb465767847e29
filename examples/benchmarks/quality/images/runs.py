"""One run of the image benchmark: a subject, a method, a seed → its records."""

from __future__ import annotations

import time
from typing import Any

import torch

from quality.images.held_out import BACKBONE, bin_centres
from quality.images.settings import BASE, NOISE_AWARE, adapted, arguments, settings
from quality.images.task import ImageTask, binned_losses, judged_samples, load_task
from quality.images.training import train
from quality.running import Job, Settings, Suite
from quality.wrong_noise import EVALUATED, while_evaluating


def image_records(
    subject: str,
    method: str,
    seed: int,
    *,
    control: str | None = None,
    progress: bool = True,
    **overrides: Any,
) -> list[dict[str, Any]]:
    """Trains once, and measures: as it is, and under each control that needs no training of its own.

    Args:
        subject: "toy", "car", "cup" or "house".
        method: a value of the train scripts' --adapter that a UNet can have, or "base", the backbone as it is.
        seed: of initialisation, order, timesteps, noise and samples.
        control: None, "constant" or "shuffled": the λ that training sees.
        overrides: arguments of train_scripts/dreambooth_sdxl.py.

    Raises:
        ValueError: an unknown subject, method or argument.
        ArithmeticError: training diverged.
    """
    args = arguments(subject, method, seed, overrides)
    started = time.perf_counter()
    task = load_task(subject)
    torch.manual_seed(seed)
    unet = adapted(task.pipe, method, args)
    if method != BASE:
        train(task, unet, args, control, progress)
    common = description(subject, method, seed, args, overrides)
    common["trainable_parameters"] = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    evaluated = EVALUATED if method in NOISE_AWARE and control is None else ()
    records = []
    for name in (control, *evaluated):
        with while_evaluating(unet, name):
            figures = _measure(task, unet, args)
        seconds = round(time.perf_counter() - started, 2)  # with the records before it
        records.append({**common, "control": name, **figures, "seconds": seconds})
    return records


def description(subject: str, method: str, seed: int, args: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    """What a record says of a run before it began."""
    is_trained = method != BASE
    return {
        "suite": "images",
        "stage": "main",
        "backbone": BACKBONE,
        "domain": subject,
        "method": method,
        "seed": seed,
        "learning_rate": args.learning_rate if is_trained else None,
        "core_learning_rate": args.core_learning_rate if method.startswith("nara") else None,
        "rank": None if method in (BASE, "full") else args.rank,
        "steps": args.max_train_steps if is_trained else 0,
        "settings": settings(overrides) if is_trained else {},
    }


def _measure(task: ImageTask, unet: Any, args: Any) -> dict[str, Any]:
    losses = binned_losses(task, unet)
    figures: dict[str, Any] = {
        "noise_levels": bin_centres(),
        "losses": losses,
        "validation_loss": sum(losses) / len(losses),
    }
    samples = judged_samples(task, unet, args)
    names = ("similarity", "text_alignment", "place_similarity")
    figures |= {name: getattr(samples, name) for name in names}
    return figures | {"n": len(samples.images)}


def run(job: Job, settings: Settings) -> list[dict[str, Any]]:
    """The records of `job`, whose backbone is the only one that there is."""
    options = {"control": job.control, "progress": False}
    return image_records(job.domain, job.method, job.seed, **options, **settings)


SUITE = Suite("images", (BACKBONE,), ("toy", "car", "cup"), run)
