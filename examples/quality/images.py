"""One run of the image benchmark: a subject, a method, a seed → its records.

from quality.images import run_one_image

run_one_image("toy", "nara", seed=0, rank=8, learning_rate=1e-3)
"""

from __future__ import annotations

import time
from typing import Any

import torch

from quality.image_controls import EVALUATED_CONTROLS, TRAINED_CONTROLS, while_evaluating
from quality.image_measurement import Measured, measure
from quality.image_methods import METHODS, adapted_unet
from quality.image_settings import arguments, changed
from quality.image_task import BACKBONE, bin_centres, load_task
from quality.image_training import train

NOISE_AWARE = ("nara", "nara_dora")


def run_one_image(
    subject: str, method: str, seed: int, *, control: str | None = None, stage: str = "main", **overrides: Any
) -> dict[str, Any]:
    """The record of one run (see `image_records`), without those of the trained adapter under a wrong λ."""
    return image_records(subject, method, seed, control=control, stage=stage, evaluated=(), **overrides)[0]


def image_records(
    subject: str,
    method: str,
    seed: int,
    *,
    control: str | None = None,
    stage: str = "main",
    evaluated: tuple[str, ...] | None = None,
    progress: bool = True,
    **overrides: Any,
) -> list[dict[str, Any]]:
    """Trains once, and measures: as it is, and under each control that needs no training of its own.

    Args:
        subject: "toy", "car", "cup" or "house".
        method: a key of `METHODS`.
        seed: of initialisation, order, timesteps, noise and samples.
        control: None, "constant" or "shuffled": the λ that training sees.
        stage: "tune", "main", "single" or "ablation".
        evaluated: controls of the trained adapter; None means all of them where they mean something.
        overrides: arguments of train_scripts/dreambooth_sdxl.py.

    Raises:
        ValueError: an unknown subject, method, control or argument; or a control of a method that knows no λ.
    """
    started = time.perf_counter()
    check(method, control)
    task = load_task(subject)
    args = arguments(subject, METHODS[method], seed, overrides)
    torch.manual_seed(seed)
    unet = adapted_unet(task.pipe, method, args)
    step_ms = train(task, unet, args, control, progress)
    common = {
        "suite": "images",
        "stage": stage,
        "backbone": BACKBONE,
        "domain": subject,
        "method": method,
        "seed": seed,
        "learning_rate": args.learning_rate,
        "core_learning_rate": args.core_learning_rate if method in NOISE_AWARE else None,
        "rank": None if method == "full" else args.rank,
        "steps": args.max_train_steps,
        "trainable_parameters": sum(p.numel() for p in unet.parameters() if p.requires_grad),
        "step_ms": step_ms,
        "settings": changed(METHODS[method], overrides),
    }
    if evaluated is None:
        evaluated = EVALUATED_CONTROLS if method in NOISE_AWARE and control is None else ()
    records = []
    for name in (control, *evaluated):
        with while_evaluating(unet, name):
            figures = describe(measure(task, unet, args))
        seconds = time.perf_counter() - started
        records.append({**common, "control": name, **figures, "seconds": seconds})
    return records


def check(method: str, control: str | None) -> None:
    """Refuses what can't be run, before anything is loaded."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}.")
    if control is not None and control not in TRAINED_CONTROLS:
        raise ValueError(f"control is {control!r}, expected none or one of {', '.join(TRAINED_CONTROLS)}.")
    if control is not None and method not in NOISE_AWARE:
        raise ValueError(f"method {method!r} knows no λ that control {control!r} could replace.")


def describe(measured: Measured) -> dict[str, Any]:
    """As a record has it."""
    return {
        "noise_levels": bin_centres(),
        "losses": measured.losses,
        "loss_errors": measured.loss_errors,
        "validation_loss": measured.validation_loss,
        "similarity": measured.similarity,
        "text_alignment": measured.text_alignment,
        "place_similarity": measured.place_similarity,
        "n": len(measured.images),
    }
