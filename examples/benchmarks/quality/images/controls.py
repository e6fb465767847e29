"""Wrong λ on purpose, in the UNet: what is left of an adapter's gain then doesn't come from knowing the noise.

constant   trained and evaluated with λ = 0.5
shuffled   trained with the λ of other samples of the stream, evaluated with the true one
reversed   the trained adapter, evaluated with 1 − λ
mean_core  the trained adapter, evaluated with the mean of C(λ) over λ
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nara_diffusion import noise_level
from nara_diffusion.dreambooth.draws import draw_indices
from quality.wrong_noise import changed_noise, constant_noise, mean_core, reversed_noise

TRAINED_CONTROLS = ("constant", "shuffled")
EVALUATED_CONTROLS = ("mean_core", "reversed")
CONSTANT = 0.5
GRID = (torch.arange(100) + 0.5) / 100  # of λ, for the mean of C


def shuffled_noise_levels(positions: Sequence[int], seed: int, levels: int, group_size: int) -> Tensor:
    """λ (b,) of samples at `positions`: drawn as the true ones are, and independent of them.

    A permutation within a batch of five would leave one sample in five its own λ.
    """
    options: dict[str, Any] = {"stratified": True, "group_size": group_size, "role": "shuffled"}
    return draw_indices(positions, torch.arange(levels), seed=seed, **options) / levels


def while_training(unet: nn.Module, control: str | None, shuffled: Tensor | None) -> AbstractContextManager[None]:
    """Inside, a forward of training reads the control's λ."""
    if control == "shuffled":
        assert shuffled is not None
        return noise_level(unet, shuffled)
    return while_evaluating(unet, control)


def while_evaluating(unet: nn.Module, control: str | None) -> AbstractContextManager[None]:
    """Inside, forwards of `unet` read what the control tells them; one that was "shuffled" in training, the truth."""
    if control == "constant":
        return changed_noise(unet, constant_noise(CONSTANT))
    if control == "reversed":
        return changed_noise(unet, reversed_noise)
    return mean_core(unet, GRID) if control == "mean_core" else nullcontext()
