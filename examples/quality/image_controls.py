"""Wrong λ on purpose, in the UNet: what is left of an adapter's gain then doesn't come from knowing the noise.

constant   trained and evaluated with λ = 0.5
shuffled   trained with the λ of other samples of the stream, evaluated with the true one
reversed   the trained adapter, evaluated with 1 − λ
mean_core  the trained adapter, evaluated with the mean of C(λ) over λ
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nara_diffusion import TimestepNoise, noise_level, set_noise_source
from nara_diffusion.dreambooth.timesteps import draw_indices
from nara_diffusion.noise import NoiseSignals

TRAINED_CONTROLS = ("constant", "shuffled")
EVALUATED_CONTROLS = ("mean_core", "reversed")
CONSTANT = 0.5


class ReversedNoise:
    """A source that tells 1 − λ."""

    convention = "timestep"

    def __init__(self) -> None:
        self.true = TimestepNoise("discrete")

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoiseSignals:
        return NoiseSignals(1 - self.true(module, args, kwargs).noise_level)


def shuffled_noise_levels(positions: Sequence[int], seed: int, levels: int, group_size: int) -> Tensor:
    """λ (b,) of samples at `positions`: drawn as the true ones are, and independent of them.

    A permutation within a batch of five would leave one sample in five its own λ.
    """
    options: dict[str, Any] = {"stratified": True, "group_size": group_size, "role": "shuffled"}
    return draw_indices(positions, seed=seed, levels=levels, **options) / levels


def while_training(unet: nn.Module, control: str | None, shuffled: Tensor | None) -> AbstractContextManager[None]:
    """Inside, a forward of training reads the control's λ."""
    if control == "constant":
        return noise_level(unet, CONSTANT)
    if control == "shuffled":
        assert shuffled is not None
        return noise_level(unet, shuffled)
    return nullcontext()


def while_evaluating(unet: nn.Module, control: str | None) -> AbstractContextManager[None]:
    """Inside, forwards of `unet` read what the control tells them."""
    if control == "constant":
        return noise_level(unet, CONSTANT)
    if control == "reversed":
        return _reversed(unet)
    if control == "mean_core":
        from nara_diffusion.controls import mean_core

        return mean_core(unet, torch.linspace(0, 1, 101))
    return nullcontext()


@contextmanager
def _reversed(unet: nn.Module):
    set_noise_source(unet, ReversedNoise())
    try:
        yield
    finally:
        set_noise_source(unet, TimestepNoise("discrete"))
