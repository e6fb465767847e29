"""Latents of training samples, from cached posteriors of the autoencoder.

    q(z | x) = N(μ(x), σ(x)²),    z = μ + σ ε,  ε ~ N(0, I) of (seed, position),    latent = what `codecs` makes of z

μ and σ are cached, ε is drawn anew each time: a cache changes the time of a step and nothing else. Each
sample is encoded by itself, since the bits of a convolution depend on the batch that it is in, and a resumed
run, which finds other samples missing, has to get the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from nara_diffusion.dreambooth.data.dataset import TrainingSample
from nara_diffusion.dreambooth.seeding import seeded_normal

from .codecs import posterior_of, scale_latents
from .tensor_cache import Entry, TensorCache, fingerprint


class LatentCache:
    """Encodes samples with an autoencoder that has a posterior, each distinct one once.

    Args:
        vae: frozen, in its own dtype and on its own device; it may be moved to the CPU when `fill` is done.
        memory_mib: bound on memory; 0 encodes each time. An SDXL latent at 1024² takes 512 KiB in float32.
        folder: a disk cache that later runs share (see `TensorCache`); entries of another autoencoder stay apart.

    Raises:
        ValueError: a negative bound, or a folder that can't be written.
    """

    def __init__(self, vae: Any, *, memory_mib: float | None = 1024.0, folder: str | Path | None = None) -> None:
        self.vae = vae
        label = fingerprint(vae) if folder is not None else ""
        self.cache = TensorCache(memory_mib=memory_mib, folder=folder, label=label, what="latents")

    def sample(
        self, samples: Sequence[TrainingSample], *, seed: int, pixel_values: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Latents (b, c, h / f, w / f), float32 on the CPU; f is the autoencoder's factor, and its patches'.

        Args:
            samples: of one target size.
            seed: of ε, with each sample's position and role.
            pixel_values: (b, 3, h, w), if they are loaded already.

        Raises:
            ValueError: the autoencoder gives NaN or infinity.
        """
        mean, std = self.posterior(samples, pixel_values)
        noise = torch.cat(
            [
                seeded_normal(mean.shape[1:], seed=seed, stream=f"posterior {sample.role}", indices=[sample.position])
                for sample in samples
            ]
        )
        return scale_latents(self.vae, mean + std * noise)

    def mode(self, samples: Sequence[TrainingSample]) -> torch.Tensor:
        """Return what `sample` gives with ε = 0; a validation loss uses it."""
        return scale_latents(self.vae, self.posterior(samples)[0])

    def posterior(
        self, samples: Sequence[TrainingSample], pixel_values: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """μ and σ (b, c, h / f, w / f), float32 on the CPU. Raises as `sample`."""
        entries = [
            self.cache.get(
                sample.key,
                lambda i=i, sample=sample: self._encode(sample, None if pixel_values is None else pixel_values[i]),
            )
            for i, sample in enumerate(samples)
        ]
        return (
            torch.stack([entry["mean"].float() for entry in entries]),
            torch.stack([entry["std"].float() for entry in entries]),
        )

    def fill(self, samples: Iterable[TrainingSample], *, progress: bool = True) -> None:
        """Encodes all `samples` that aren't known, or as many as fit; see `DreamBoothDataset.distinct_samples`."""
        for sample in tqdm(list(samples), desc="encode images", unit="crop", disable=not progress):
            if self.cache.full and self.cache.folder is None:
                break
            self.posterior([sample])

    @torch.no_grad()
    def _encode(self, sample: TrainingSample, pixels: torch.Tensor | None) -> Entry:
        parameter = next(self.vae.parameters())
        pixels = sample.pixel_values() if pixels is None else pixels
        mean, std = posterior_of(self.vae, pixels[None].to(parameter.device, parameter.dtype))
        entry = {"mean": mean[0], "std": std[0]}
        if not all(tensor.isfinite().all() for tensor in entry.values()):
            raise ValueError(_not_finite(sample, parameter.dtype))
        return entry


def _not_finite(sample: TrainingSample, dtype: torch.dtype) -> str:
    what = f"the autoencoder gives NaN or infinity for {sample.image.source.name}, computing in {dtype}"
    if dtype == torch.float16:
        return (
            f"{what}: SDXL's own autoencoder overflows in float16. Use --pretrained_vae_model_name_or_path "
            "madebyollin/sdxl-vae-fp16-fix, or --upcast_vae to run it in float32, or --mixed_precision bf16."
        )
    return f"{what}: its weights are damaged. Name another with --pretrained_vae_model_name_or_path."
