"""Latents of images and embeddings of prompts, each encoded once.

    q(z | x) = N(μ(x), σ(x)²),    z = μ + σ ε,    latents = `scale_latents` of z

with ε ~ N(0, I) drawn from (seed, position). μ, σ and the embeddings are computed once, while ε is
drawn anew each time. A cache therefore makes a step faster but doesn't change its result.

Each image and each prompt is encoded alone. In a batch, the last bits would depend on the other
samples, and a resumed run has to get the same bits with different batches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import zip_longest

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import pixel_unshuffle
from torch.nn.utils.rnn import pad_sequence

from .dataset import TrainingSample
from .draws import seeded_normal
from .families import Embeddings, Family
from .pipelines import family_of
from .placement import device_of

logger = logging.getLogger(__name__)


class TensorCache:
    """A cache of tensors by key, on the CPU.

    Args:
        memory_mib: the size of the cache in MiB. Tensors that don't fit are recomputed at each use.
            In float32, a prompt of SDXL takes 620 KiB.
    """

    def __init__(self, memory_mib: float = 1024.0) -> None:
        self.free = memory_mib * 2**20
        self.full = False
        self._entries: dict[str, tuple[Tensor, ...]] = {}

    @torch.no_grad()
    def get(self, key: str, make: Callable[[], Iterable[Tensor]]) -> tuple[Tensor, ...]:
        """Return the tensors of `key`; call `make` only if they aren't in memory."""
        if key in self._entries:
            return self._entries[key]
        entry = tuple(tensor.detach().cpu().contiguous() for tensor in make())
        size = sum(tensor.nbytes for tensor in entry)
        if size <= self.free:
            self._entries[key] = entry
            self.free -= size
        elif not self.full:
            self.full = True
            logger.warning(
                "latents or prompts don't fit into memory, so some are encoded again at each use and training is slower"
            )
        return entry


class LatentCache:
    """A cache of the latents (b, c, h / f, w / f) of training samples.

    Each distinct crop is encoded once.

    Args:
        vae: a frozen autoencoder with a posterior. It is used in its own dtype and on its device.
        memory_mib: the size of the cache in MiB. An SDXL latent at 1024² takes 512 KiB in float32.
        mask_floor: the weight outside of masks.
        source_pixels: a function that resizes an image to edit and returns its pixels (1, 3, h, w).
    """

    def __init__(
        self,
        vae: ModelMixin,
        *,
        memory_mib: float = 1024.0,
        mask_floor: float = 0.0,
        source_pixels: Callable[[Image], Tensor] | None = None,
    ) -> None:
        self.vae = vae
        self.mask_floor = mask_floor
        self.cache = TensorCache(memory_mib)
        self.source_pixels = source_pixels

    def sample(self, samples: Sequence[TrainingSample], *, seed: int) -> Tensor:
        """Return the latents (b, c, h / f, w / f) of samples of one size, float32 on the CPU.

        f is the downscaling factor of the autoencoder and its patches. ε depends on `seed` and on
        the position and role of each sample.
        """
        mean, std = self._posterior(samples)
        draw = partial(seeded_normal, mean.shape[1:], seed=seed)
        rows = [draw(stream=f"posterior {s.role}", indices=[s.position]) for s in samples]
        return scale_latents(self.vae, mean + std * torch.cat(rows))

    def mode(self, samples: Sequence[TrainingSample]) -> Tensor:
        """Return the same latents as `sample`, but with ε = 0, for a validation loss."""
        mean, _ = self._posterior(samples)
        return scale_latents(self.vae, mean)

    def sources(self, samples: Sequence[TrainingSample]) -> tuple[Tensor, ...]:
        """Return the latents of the images to edit, each (b, c, h_i, w_i), with ε = 0."""
        latents = []
        for number in range(len(samples[0].image.sources)):
            entries = [
                self.cache.get(s.source_keys[number], partial(self._encode_source, s, number))
                for s in samples
            ]
            means = torch.stack([mean for (mean,) in entries])
            latents.append(scale_latents(self.vae, means.float()))
        return tuple(latents)

    def _encode_source(self, sample: TrainingSample, number: int) -> tuple[Tensor, ...]:
        """Return μ (c, h, w) of one of a sample's sources."""
        assert self.source_pixels is not None
        return posterior_of(self.vae, self.source_pixels(sample.source_images()[number]))[:1]

    def weights(self, samples: Sequence[TrainingSample], latents: Tensor) -> Tensor | None:
        """Return the weights of squared errors at `latents`, float32 on the CPU; None without masks.

        Their shape is (b, 1, h', w'), or that of patches of 2 × 2, with the channels of `scale_latents`.
        """
        if not any(sample.image.mask for sample in samples):
            return None
        patch = 2 if hasattr(self.vae, "bn") else 1
        grid = (patch * latents.shape[2], patch * latents.shape[3])
        means = []
        for sample in samples:
            key = f"mask {sample.image.mask and sample.image.mask.key} {sample.key}"
            means += self.cache.get(key, partial(sample.mask_values, grid))
        weights = pixel_unshuffle(torch.stack(means).clamp_min(self.mask_floor), patch)
        return weights if patch == 1 else weights.repeat(1, latents.shape[1] // patch**2, 1, 1)

    def _posterior(self, samples: Sequence[TrainingSample]) -> tuple[Tensor, Tensor]:
        """Return μ and σ (b, c, h', w'), float32 on the CPU."""
        entries = [self.cache.get(sample.key, partial(self._encode, sample)) for sample in samples]
        mean, std = (torch.stack(part).float() for part in zip(*entries, strict=True))
        return mean, std

    def _encode(self, sample: TrainingSample) -> tuple[Tensor, Tensor]:
        return posterior_of(self.vae, sample.pixel_values()[None])


class PromptCache:
    """A cache of the embeddings of prompts, in parts (b, …).

    The pipeline's frozen text encoders encode each distinct prompt once.

    Args:
        pipe: the pipeline, with its tokenizers and text encoders.
        family: the family of the pipeline, with the settings of the run; by default with the
            family's own settings.
    """

    def __init__(self, pipe: DiffusionPipeline, family: Family | None = None) -> None:
        self.pipe = pipe
        self.family = family or family_of(pipe)
        self.cache = TensorCache(memory_mib=8192.0)  # FLUX.1's take 4 MiB each

    def fill(self, prompts: Iterable[str], sample: TrainingSample | None = None) -> None:
        """Encode prompts, all with the sample that `get` takes, until the cache is full."""
        for prompt in prompts:
            if not self.cache.full:
                self.get([prompt], [sample])

    def get(
        self, prompts: Sequence[str], samples: Sequence[TrainingSample | None] = ()
    ) -> Embeddings:
        """Return the embeddings of b prompts: parts (b, …), on the CPU, in the encoders' dtype.

        Args:
            samples: the samples of the prompts, with the images that a text encoder may read too.
        """
        entries = [self._entry(*pair) for pair in zip_longest(prompts, samples)]
        return tuple(
            pad_sequence([*parts], batch_first=True) for parts in zip(*entries, strict=True)
        )

    def _entry(self, prompt: str, sample: TrainingSample | None) -> Embeddings:
        """Return the embeddings of one prompt, parts (l, d) or (d,)."""
        encode = self.family.source_encoder
        if encode is None or sample is None:
            return self.cache.get(
                prompt, lambda: (part[0] for part in self.family.encode(self.pipe, [prompt]))
            )
        key = "\n".join([*sample.source_keys, prompt])
        return self.cache.get(
            key, lambda: (part[0] for part in encode(self.pipe, prompt, sample.source_images()))
        )


def posterior_of(vae: ModelMixin, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return μ and σ (c, h, w) of an image (1, 3, h, w)."""
    pixels = pixels.to(device_of(vae), next(vae.parameters()).dtype)
    if "temperal_downsample" in vae.config:  # Wan's and Qwen-Image's take videos
        posterior = vae.encode(pixels[:, :, None]).latent_dist
        return posterior.mean[0, :, 0], posterior.std[0, :, 0]
    posterior = vae.encode(pixels).latent_dist
    return posterior.mean[0], posterior.std[0]


def scale_latents(vae: ModelMixin, z: Tensor) -> Tensor:
    """Return the latents that the denoiser takes, from z (b, c, h, w) of an autoencoder.

    m and d are `latents_mean` and `latents_std` in the configuration, if present:

        AutoencoderKL          (z − shift_factor) · scaling_factor, or (z − m) · scaling_factor / d
        Wan's, Qwen-Image's    (z − m) / d
        FLUX.2's               patches of 2 × 2, (b, 4 c, h / 2, w / 2), then (z − μ) / √(v + ε),
                               with μ, v and ε of its batch norm
    """
    config = vae.config
    if hasattr(vae, "bn"):
        mean = _per_channel(vae.bn.running_mean, z)
        variance = _per_channel(vae.bn.running_var, z)
        patches = pixel_unshuffle(z, 2)
        return (patches - mean) / (variance + config.batch_norm_eps).sqrt()
    mean = getattr(config, "latents_mean", None)
    std = getattr(config, "latents_std", None)
    scale = getattr(config, "scaling_factor", None) or 1.0
    if mean is None or std is None:
        shift = getattr(config, "shift_factor", None) or 0.0
        return (z - shift) * scale
    return (z - _per_channel(mean, z)) * scale / _per_channel(std, z)


def _per_channel(values: Tensor | Sequence[float], z: Tensor) -> Tensor:
    """Return values (c,) as (1, c, 1, 1), on the device and in the dtype of z."""
    return torch.as_tensor(values, dtype=z.dtype, device=z.device).view(1, -1, 1, 1)
