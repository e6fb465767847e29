"""Held-out losses of a training that holds the base outside of a window of λ: there a distance to the base, which is 0
for the base itself, so that shares of it would count a drift that is small beside any loss like a large one.

    ℓ = D(F, F₀) + ℓ₀        where the base is held

D is the training's distance of the adapted model F to its base F₀, without its weight W, and ℓ₀ the base's own loss,
in D's unit: of images a plain squared error, since min-SNR's and other weights don't enter D.
The sum is what F loses on data if F₀ is right about them: the squared error of an ε-model whose base predicts the mean,
the cross-entropy of a language model whose base has the right probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nara_diffusion.noise.window import NoiseWindow
from nara_diffusion.training.base_hold import SplitLosses, as_base

from .trial import Loss


@dataclass(frozen=True)
class FreeWindow(NoiseWindow):
    """The noise levels of a window outside of which the base is held, with the loss on data at all of them."""

    def held(self, noise_level: Tensor) -> Tensor:
        return torch.zeros_like(noise_level, dtype=torch.bool)


@dataclass(frozen=True)
class CheckLosses:
    """Losses of samples beside their λ; see `nara_diffusion.training.loop.StepLoss`."""

    loss: Tensor
    per_sample: Tensor
    noise_level: Tensor
    split: SplitLosses | None = None


def free_window(window: NoiseWindow) -> FreeWindow:
    """The same noise levels, drawn alike."""
    return FreeWindow(window.low, window.high, window.hold_weight, window.outside_share)


def with_base_losses(model: nn.Module, held: Loss, free: Loss) -> Loss:
    """The losses ℓ of the module's docstring.

    Args:
        held: the loss of the training, with its window.
        free: the same with its `free_window`, and without weights that the distance to the base doesn't have.
    """

    def loss(positions: Sequence[int]) -> CheckLosses:
        split: Any = held(positions).split
        with as_base(model):
            base = free(positions).per_sample  # (b,)
        losses = torch.where(split.held, split.values + base, split.values)
        return CheckLosses(losses.mean(), losses, split.noise_level, split)

    return loss
