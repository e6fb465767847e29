"""Wrong λ on purpose: what is left of an adapter's gain then doesn't come from knowing the noise.

constant   trained and evaluated with λ = 0.5
shuffled   trained with the λ of another sample of the batch, evaluated with the true one
mean_core  the trained adapter, evaluated with the mean of C(λ) over the ten bins' centres
reversed   the trained adapter, evaluated with 1 − λ
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from quality.running import is_noise_aware
from quality.text.validation import CENTRES
from quality.wrong_noise import Change, changed_noise, constant_noise, mean_core, reversed_noise

TRAINED, EVALUATED = ("constant", "shuffled"), ("mean_core", "reversed")
CONSTANT = 0.5


def check_control(method: str, control: str | None) -> None:
    """Raises ValueError for an unknown control, or one of a method that knows no λ."""
    if control is None:
        return
    if control not in TRAINED:
        raise ValueError(f"control is {control!r}, expected none or one of {', '.join(TRAINED)}")
    if not is_noise_aware(method):
        raise ValueError(f"method {method!r} knows no λ that control {control!r} could replace")


def while_training(model: nn.Module, control: str | None, seed: int) -> AbstractContextManager[None]:
    """Inside, the cores of `model` read the λ of a control of training."""
    if control == "constant":
        return changed_noise(model, constant_noise(CONSTANT))
    if control == "shuffled":
        return changed_noise(model, exchanged_noise(torch.Generator().manual_seed(seed)))
    return nullcontext()


def while_evaluating(model: nn.Module, control: str | None) -> AbstractContextManager[None]:
    """Inside, the cores of `model` are what a control makes of them in evaluation."""
    if control == "constant":
        return changed_noise(model, constant_noise(CONSTANT))
    if control == "reversed":
        return changed_noise(model, reversed_noise)
    if control == "mean_core":
        return mean_core(model, CENTRES)
    return nullcontext()


def exchanged_noise(generator: torch.Generator) -> Change:
    """Each sample has the λ of another one than itself, by a random cycle through the batch for each core's call."""

    def change(signal: Tensor) -> Tensor:
        cycle = torch.randperm(len(signal), generator=generator)
        result = torch.empty_like(signal)
        result[cycle] = signal[cycle.roll(1)]
        return result

    return change
