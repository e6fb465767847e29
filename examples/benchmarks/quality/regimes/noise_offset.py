"""The regime noise_offset, and two simpler ways to it than an adapter that knows λ.

    ε + 0.3 δ, δ (c,) a number of each channel          under Diffusers' --noise_offset; losses are shares of the base's

*A gain*: the mean of each channel of the prediction times 1 + g(λ), forty numbers, trained in an adapter's place.

*The shift*: what is known of the offset in closed form, by the channel's mean.

    x = p x₀ + q (ε + κ δ)       m(x) = E[κ δ | mean of x] = κ² q (p² S + q² (κ² + 1/n) I)⁻¹ (mean x − p μ)

μ (c,) and S (c, c) are mean and covariance of the training latents' channel means, which have n pixels. The UNet sees
x − q m, which has less of the offset, and m is added to what it predicts. That is fourteen numbers, and no training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nara_diffusion.dreambooth.dataset import DreamBoothDataset
from nara_diffusion.dreambooth.draws import seeded_normal
from quality.images.held_out import BINS, LEVELS, SIZE, Shown, base, clean_bins
from quality.regimes.image_regimes import (
    SUBJECT,
    Backbone,
    Conversion,
    UNetBackbone,
    build_conversion,
    conversion_pictures,
)
from quality.running import BASE


@dataclass(frozen=True)
class Offset(Conversion):
    """ε under a noise offset; losses are shares of the base's, in each bin."""

    objective_name: str = "eps"
    offset: float = 0.3

    def held_out(self) -> list[Shown]:
        """With `offset` of a normal number of each picture and channel added to the noise."""
        bins = []
        for number, clean in enumerate(clean_bins(SUBJECT)):
            count, channels = clean.noise.shape[:2]
            drawn_by = {"seed": 0, "stream": f"held-out offset {number}", "indices": range(count)}
            noise = clean.noise + self.offset * seeded_normal((channels, 1, 1), **drawn_by)
            bins.append(replace(clean, noise=noise).corrupted(self.objective))
        return bins

    def figures(self, unet: Any) -> dict[str, Any]:
        """losses: of each bin, as shares; score: their mean."""
        losses = super().figures(unet)["losses"]
        shares = [loss / base_loss for loss, base_loss in zip(losses, _base_losses(), strict=True)]
        return {"losses": shares, "score": fmean(shares)}


@cache
def _base_losses() -> list[float]:
    return Conversion.figures(Offset(), base().pipe.unet)["losses"]


# ---------------------------------------------------------------------- the gain


class GainedBackbone(UNetBackbone):
    """The UNet as it is, but for the gains."""

    def adapted(self, method: str, args: Any) -> Any:
        unet = super().adapted(BASE, args).requires_grad_(False)
        unet.gain = nn.Parameter(torch.zeros(BINS, unet.config.out_channels))

        def gained(unet: Any, _: Any, options: dict[str, Any], output: tuple[Tensor]) -> tuple[Tensor]:
            (said,) = output  # (b, c, h, w)
            gain = unet.gain[(BINS * options["timestep"] / LEVELS).long()]  # (b, c)
            return (said + (gain * said.mean((2, 3)))[..., None, None],)

        unet.register_forward_hook(gained, with_kwargs=True)
        return unet


class GainedOffset(Offset):
    """By gains of the prediction's channels in place of an adapter."""

    backbone: ClassVar[Backbone] = GainedBackbone()


# ---------------------------------------------------------------------- the shift


class ShiftedBackbone(UNetBackbone):
    """The UNet behind and before the shift."""

    def adapted(self, method: str, args: Any) -> Any:
        unet = super().adapted(method, args)
        shift: list[Tensor] = []  # of the running forward

        def before(_: Any, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            m, q = expected_shift(options["sample"], options["timestep"])
            shift[:] = [m]
            return inputs, options | {"sample": options["sample"] - q * m}

        unet.register_forward_pre_hook(before, with_kwargs=True)
        unet.register_forward_hook(lambda _, inputs, output: (output[0] + shift[0],))
        return unet


class ShiftedOffset(Offset):
    """With the shift; losses are shares of the base's without it."""

    backbone: ClassVar[Backbone] = ShiftedBackbone()


def expected_shift(sample: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """m (b, c, 1, 1) and q (b, 1, 1, 1) of x (b, c, h, w) at timesteps (b,)."""
    weights, mean, p, q = _coefficients()
    index = timestep.long().expand(len(sample))
    difference = sample.mean((2, 3)) - p[index, None] * mean  # (b, c)
    m = torch.einsum("bij,bj->bi", weights[index], difference)
    return m[..., None, None], q[index, None, None, None]


@cache
def _coefficients() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """κ² q (…)⁻¹ (N, c, c), μ (c,), p and q (N,), float32."""
    offset, objective = Offset().offset, build_conversion("eps")
    samples = DreamBoothDataset(conversion_pictures(), [SIZE], batch_size=1, seed=0).plain_samples()
    latents = base().latents.mode(samples).double()  # (n, c, h, w)
    means, pixels = latents.mean((2, 3)), latents.shape[-1] * latents.shape[-2]
    p, q = objective.p[:, None, None], objective.q[:, None, None]
    noise = (offset**2 + 1 / pixels) * torch.eye(means.shape[1], dtype=torch.float64)
    weights = offset**2 * q * torch.linalg.inv(p**2 * torch.cov(means.T) + q**2 * noise)
    return weights.float(), means.mean(0).float(), objective.p.float(), objective.q.float()
