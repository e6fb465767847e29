"""Wrong λ on purpose: what is left of an adapter's gain then doesn't come from knowing the noise.

constant   trained and evaluated with λ = 0.5
shuffled   trained with the λ of another sample of the batch, evaluated with the true one
mean_core  the trained adapter, evaluated with the mean of C(λ) over the ten bins' centres
reversed   the trained adapter, evaluated with 1 − λ
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from nara_diffusion.dllm.masking import MaskedBatch
from quality.recipe import Recipe
from quality.validation import CENTRES

TRAINED, EVALUATED = ("constant", "shuffled"), ("mean_core", "reversed")
NOISE_AWARE = ("nara", "nara_dora")
CONSTANT = 0.5

Told = Callable[[MaskedBatch], torch.Tensor]


def check_control(method: str, control: str | None) -> None:
    """Raises ValueError for an unknown control, or one of a method that knows no λ."""
    if control is None:
        return
    if control not in TRAINED:
        raise ValueError(f"control is {control!r}, expected none or one of {', '.join(TRAINED)}")
    if method not in NOISE_AWARE:
        raise ValueError(f"method {method!r} knows no λ that control {control!r} could replace")


def told_in_training(batch: MaskedBatch, recipe: Recipe, control: str | None, seed: int, step: int) -> torch.Tensor:
    """The λ (b,) that the model is told in training, which need not be the one by which tokens were masked."""
    level = masked_share(batch) if recipe.told == "masked_share" else batch.noise_level
    if control == "constant":
        return torch.full_like(level, CONSTANT)
    if control == "shuffled":
        return exchanged(level, torch.Generator().manual_seed(seed * 1_000_003 + step))
    return level


def told_in_evaluation(recipe: Recipe, control: str | None) -> Told:
    """What gives the λ (b,) that a model is told of a validation batch."""
    if control == "constant":
        return lambda batch: torch.full_like(batch.noise_level, CONSTANT)
    true: Told = masked_share if recipe.told == "masked_share" else lambda batch: batch.noise_level
    return (lambda batch: 1 - true(batch)) if control == "reversed" else true


def while_evaluating(model: nn.Module, control: str | None) -> AbstractContextManager:
    """Inside, the cores of `model` are what the control makes of them."""
    if control != "mean_core":
        return nullcontext()
    from nara_diffusion.controls import mean_core

    return mean_core(model, torch.tensor(CENTRES))


def masked_share(batch: MaskedBatch) -> torch.Tensor:
    """The share (b,) of each answer that is masked."""
    return batch.masked.sum(1) / batch.answer.sum(1)


def exchanged(level: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The same values (b,), each at another sample than its own: a random cycle through all of them."""
    cycle = torch.randperm(len(level), generator=generator)
    result = torch.empty_like(level)
    result[cycle] = level[cycle.roll(1)]
    return result
