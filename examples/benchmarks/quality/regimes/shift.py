"""A noise offset, but for what is known of it in closed form: the shift of each channel, by the channel's mean.

    x = p x₀ + q (ε + κ δ)       m(x) = E[κ δ | mean of x] = κ² q (p² S + q² (κ² + 1/n) I)⁻¹ (mean x − p μ)

δ (c,) is a number of each channel; μ (c,) and S (c, c) are mean and covariance of the training latents' channel means,
which have n pixels. The UNet sees x − q m, which has less of the offset, and m is added to what it predicts. That is
fourteen numbers, and no training.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from nara_diffusion.dreambooth.dataset import DreamBoothDataset
from quality.images.held_out import SIZE
from quality.regimes.image_regimes import (
    Backbone,
    Offset,
    UNetBackbone,
    base_pipeline,
    build_conversion,
    conversion_data,
)


class ShiftedBackbone(UNetBackbone):
    """The UNet behind and before the shift."""

    def adapted(self, method: str, args: Any) -> Any:
        unet = super().adapted(method, args)
        shift: list[Tensor] = []  # of the running forward

        def before(_: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            sample = options["sample"] if "sample" in options else inputs[0]
            timestep = options["timestep"] if "timestep" in options else inputs[1]
            m, q = expected_shift(sample, timestep)
            shift[:] = [m]
            if "sample" in options:
                return inputs, options | {"sample": sample - q * m}
            return (sample - q * m, *inputs[1:]), options

        def after(_: Any, inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (output[0] + shift[0], *output[1:])
            return type(output)(sample=output.sample + shift[0])

        unet.register_forward_pre_hook(before, with_kwargs=True)
        unet.register_forward_hook(after)
        return unet


class ShiftedOffset(Offset):
    """The regime noise_offset with the shift; losses are shares of the base's without it."""

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
    data, offset = conversion_data(), Offset().offset
    samples = DreamBoothDataset(data.instances, [SIZE], batch_size=1, seed=0).plain_samples()
    latents = data.latents.mode(samples).double()  # (n, c, h, w)
    means, pixels = latents.mean((2, 3)), latents.shape[-1] * latents.shape[-2]
    objective = build_conversion("eps", base_pipeline().scheduler)
    p, q = objective.p[:, None, None], objective.q[:, None, None]
    noise = (offset**2 + 1 / pixels) * torch.eye(means.shape[1], dtype=torch.float64)
    weights = offset**2 * q * torch.linalg.inv(p**2 * torch.cov(means.T) + q**2 * noise)
    return weights.float(), means.mean(0).float(), objective.p.float(), objective.q.float()
