"""Latents and prompt embeddings, computed once.

    q(z | x) = N(μ(x), σ(x)²),    z = μ + σ ε,  ε ~ N(0, I) of (seed, position),    latents = `scale_latents` of z

μ and σ are cached, ε is drawn anew each time: a cache changes the time of a step and nothing else. Each sample and
prompt is encoded by itself, since bits depend on the batch, and a resumed run, which meets others in its batches, has
to get the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .dataset import TrainingSample
from .draws import seeded_normal
from .family import Embeddings, Family, stack_padded
from .pipelines import family_of

logger = logging.getLogger(__name__)


class TensorCache:
    """`cache.get(key, make)` are the tensors of `key`, on the CPU; it calls `make()` only if they aren't known.

    Args:
        memory_mib: bound on what is kept, in MiB; what comes after that is made at each use.
    """

    def __init__(self, memory_mib: float) -> None:
        self.free, self.full = memory_mib * 2**20, False
        self._entries: dict[str, tuple[Tensor, ...]] = {}

    @torch.no_grad()
    def get(self, key: str, make: Callable[[], Iterable[Tensor]]) -> tuple[Tensor, ...]:
        """From memory, else made."""
        if key in self._entries:
            return self._entries[key]
        entry = tuple(tensor.detach().cpu().contiguous() for tensor in make())
        size = sum(tensor.nbytes for tensor in entry)
        if size <= self.free:
            self._entries[key], self.free = entry, self.free - size
        elif not self.full:
            self.full = True
            logger.warning("latents or prompts don't fit into memory: the rest is encoded at each use")
        return entry


class LatentCache:
    """Latents of training samples by an autoencoder that has a posterior, each distinct crop encoded once.

    Args:
        vae: frozen, in its own dtype and on its own device.
        memory_mib: bound on memory. An SDXL latent at 1024² takes 512 KiB in float32.
    """

    def __init__(self, vae: Any, *, memory_mib: float = 1024.0) -> None:
        self.vae, self.cache = vae, TensorCache(memory_mib)

    def sample(self, samples: Sequence[TrainingSample], *, seed: int) -> Tensor:
        """Latents (b, c, h / f, w / f) of samples of one size, float32 on the CPU.

        f is the autoencoder's factor, and its patches'. ε is drawn from `seed` and each sample's position and role.
        """
        mean, std = self._posterior(samples)
        draws = [{"stream": f"posterior {sample.role}", "indices": [sample.position]} for sample in samples]
        noise = torch.cat([seeded_normal(mean.shape[1:], seed=seed, **draw) for draw in draws])
        return scale_latents(self.vae, mean + std * noise)

    def mode(self, samples: Sequence[TrainingSample]) -> Tensor:
        """What `sample` gives with ε = 0; a validation loss uses it."""
        return scale_latents(self.vae, self._posterior(samples)[0])

    def _posterior(self, samples: Sequence[TrainingSample]) -> tuple[Tensor, ...]:
        """μ and σ (b, c, h', w'), float32 on the CPU."""
        entries = [self.cache.get(sample.key, partial(self._encode, sample)) for sample in samples]
        return tuple(torch.stack(parts).float() for parts in zip(*entries, strict=True))

    def _encode(self, sample: TrainingSample) -> list[Tensor]:
        weight = next(self.vae.parameters())
        pixels = sample.pixel_values()[None].to(weight.device, weight.dtype)
        return [part[0] for part in posterior_of(self.vae, pixels)]


class PromptCache:
    """The embeddings of each distinct prompt, encoded once by a pipeline's frozen text encoders.

    Args:
        pipe: with its tokenizers and text encoders.
        family: how they are read, with the conditions of the run; None takes the pipeline's family.
        memory_mib: bound on memory; a prompt of SDXL takes 620 KiB in float32.
    """

    def __init__(self, pipe: Any, family: Family | None = None, *, memory_mib: float = 1024.0) -> None:
        self.pipe, self.family, self.cache = pipe, family or family_of(pipe), TensorCache(memory_mib)

    def get(self, prompts: Sequence[str]) -> Embeddings:
        """What the family makes of b prompts, each part (b, …), on the CPU, in the encoders' dtype."""
        entries = [self.cache.get(prompt, partial(self._encode, prompt)) for prompt in prompts]
        return tuple(stack_padded(parts) for parts in zip(*entries, strict=True))

    def _encode(self, prompt: str) -> list[Tensor]:
        return [part[0] for part in self.family.encode(self.pipe, [prompt])]


def posterior_of(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """μ and σ (b, c, h, w) of images (b, 3, h, w); Wan's and Qwen-Image's autoencoders read them as videos."""
    video = "temperal_downsample" in vae.config
    posterior = vae.encode(pixels[:, :, None] if video else pixels).latent_dist
    return (posterior.mean[:, :, 0], posterior.std[:, :, 0]) if video else (posterior.mean, posterior.std)


def scale_latents(vae: Any, z: Tensor) -> Tensor:
    """z (b, c, h, w) of an autoencoder → the latents that the denoiser reads.

    m and d are the configuration's `latents_mean` and `latents_std`, where it has them:

        AutoencoderKL          (z − shift_factor) · scaling_factor, or (z − m) · scaling_factor / d
        Wan's, Qwen-Image's    (z − m) / d
        FLUX.2's               patches of 2 × 2, (b, 4 c, h / 2, w / 2), then (z − μ) / √(v + ε) of its batch norm
    """
    if hasattr(vae, "bn"):
        mean, variance = (t.to(z.device, z.dtype).view(1, -1, 1, 1) for t in (vae.bn.running_mean, vae.bn.running_var))
        patches = torch.nn.functional.pixel_unshuffle(z, 2)
        return (patches - mean) / (variance + vae.config.batch_norm_eps).sqrt()
    config = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    scale = getattr(config, "scaling_factor", None) or 1.0
    if mean is None or std is None:
        return (z - (getattr(config, "shift_factor", None) or 0.0)) * scale
    mean, std = (torch.tensor(value, dtype=z.dtype, device=z.device).view(1, -1, 1, 1) for value in (mean, std))
    return (z - mean) * scale / std
