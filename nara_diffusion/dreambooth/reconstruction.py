"""Reconstruct images with the autoencoder alone, without denoiser or adapter.

    x (3, h, w) in [−1, 1] → μ(x) → x̂ (3, h, w),    PSNR = 10 log10(4 / mean (x − x̂)²), in dB

No adapter of the denoiser can show more of the subject than x̂.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from torch import Tensor

from .caches import posterior_of, reads_videos
from .dataset import TrainingSample
from .placement import device_of

logger = logging.getLogger(__name__)

FAITHFUL = 25.0
"""A PSNR in dB. Below this value, colours and shapes in the images change visibly."""
AT_MOST = 32
"""The number of images to decode: enough for a sheet and a mean. Large images take a second each
on a GPU."""


@dataclass(frozen=True)
class Reconstruction:
    """The first images of a run after reconstruction, as centre crops at training size."""

    images: Sequence[Image.Image]
    psnr: float  # in dB, the mean over the images

    @property
    def title(self) -> str:
        """The title for the sheet of samples."""
        return f"what the autoencoder can show ({self.psnr:.1f} dB)"


@torch.no_grad()
def reconstruct(vae: ModelMixin, samples: Sequence[TrainingSample]) -> Reconstruction:
    """Encode and decode samples one by one, and log a message if they change visibly."""
    images, ratios = [], []
    for sample in samples[:AT_MOST]:
        pixels = sample.pixel_values()
        decoded = decoded_pixels(vae, pixels)
        error = (decoded - pixels).square().mean().clamp_min(1e-10)
        ratios.append(10 * torch.log10(4 / error).item())
        values = ((decoded + 1) * 127.5).round().byte()
        images.append(Image.fromarray(values.permute(1, 2, 0).numpy()))
    reconstruction = Reconstruction(images, sum(ratios) / len(ratios))
    if reconstruction.psnr < FAITHFUL:
        logger.info(
            "The model's autoencoder reproduces the training images at %.1f dB (PSNR). Below %.0f dB, colours and "
            "shapes change, whatever the adapter learns: see the autoencoder's row in samples.png.",
            reconstruction.psnr,
            FAITHFUL,
        )
    return reconstruction


def decoded_pixels(vae: ModelMixin, pixels: Tensor) -> Tensor:
    """Return x̂ (3, h, w), float32 on the CPU in [−1, 1], the reconstruction of x (3, h, w)."""
    weight = next(vae.parameters())
    mean, _ = posterior_of(vae, pixels[None].to(device_of(vae), weight.dtype))
    if reads_videos(vae):  # a video of one frame
        return vae.decode(mean[:, :, None]).sample[0, :, 0].clamp(-1, 1).float().cpu()
    return vae.decode(mean).sample[0].clamp(-1, 1).float().cpu()
