"""Measurements before and after a training, split over processes: exact match, and the loss over λ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from nara_diffusion.dllm.data.collator import AnswerCollator
from nara_diffusion.noise.window import EVERYTHING, NoiseWindow
from nara_diffusion.training.engines import split_across_processes
from nara_diffusion.training.measures import before_and_after, validation_means

from .exact_match import exact_match
from .noise_curve import noise_level_curve, objective_losses


@dataclass(frozen=True)
class Measurement:
    """Attributes:
    exact_match: share of right answers, in [0, 1].
    generations: one {instruction, generation, extracted, answer, correct} a test row.
    noise_levels, curve: λ, and the loss there in nats a masked token.
    validation_loss: the training objective on the validation rows.
    """

    exact_match: float
    generations: list[dict[str, Any]]
    noise_levels: list[float]
    curve: list[float]
    validation_loss: float


def measure(
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    validation_rows: Dataset,
    test_rows: Dataset,
    collator: AnswerCollator,
    *,
    seed: int,
    batch_size: int,
    curve_points: int,
    **generation: Any,
) -> Measurement:
    """Measure `model` with its adapter enabled or disabled, as it is now.

    Args:
        model: without DDP's wrapper, whose forward has to run equally often on all processes.
        curve_points: the number of λ, equally spaced up to 1.
        **generation: further arguments of `exact_match`.
    """
    progress = accelerator.is_main_process
    levels = [(i + 1) / curve_points for i in range(curve_points)]

    def generate(indices: Sequence[int]) -> list[dict[str, Any]]:
        generator = torch.Generator(accelerator.device).manual_seed(seed)
        rows = test_rows.select(indices)
        options = {"batch_size": batch_size, "progress": progress, "generator": generator}
        return exact_match(model, tokenizer, rows, **options, **generation).generations  # type: ignore[arg-type]

    def losses(indices: Sequence[int]) -> list[float]:
        chosen = [levels[i] for i in indices]
        options = {"collator": collator, "batch_size": batch_size, "seed": seed, "progress": progress}
        return noise_level_curve(model, validation_rows, chosen, **options)  # type: ignore[arg-type]

    generations = split_across_processes(accelerator, len(test_rows), generate)
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size}
    return Measurement(
        exact_match=sum(generation["correct"] for generation in generations) / len(generations),
        generations=generations,
        noise_levels=levels,
        curve=split_across_processes(accelerator, len(levels), losses),
        validation_loss=validation_losses(accelerator, model, validation_rows, collator, **options)["validation_loss"],
    )


def compare(before: Measurement, after: Measurement) -> dict[str, Any]:
    """The content of results.json: both measurements, without the generations."""
    return before_and_after(before, after, ("exact_match", "validation_loss", "curve"))


def validation_losses(
    accelerator: Accelerator,
    model: nn.Module,
    rows: Dataset,
    collator: AnswerCollator,
    *,
    seed: int,
    batch_size: int,
    window: NoiseWindow = EVERYTHING,
) -> dict[str, float]:
    """{"validation_loss", "validation_loss_low", …}: the training objective, at the same λ and masks at each call.

    λ is spread over all of (0, 1]; with a `window` the means inside and outside of it are there too.
    """

    def losses(indices: Sequence[int]) -> list[tuple[float, float]]:
        return objective_losses(model, rows, indices, collator, seed=seed, batch_size=batch_size)  # type: ignore[arg-type]

    pairs = torch.tensor(split_across_processes(accelerator, len(rows), losses), dtype=torch.float32)
    return validation_means(*pairs.unbind(1), window)
