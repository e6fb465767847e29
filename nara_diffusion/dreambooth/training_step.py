"""One forward of training: a batch of samples → latents → noise → the denoiser's error.

    q(z | x) = N(μ(x), σ(x)²),    z = μ + σ ε,  ε ~ N(0, I) of (seed, position),    latents = `scale_latents` of z

μ, σ and prompts' embeddings are computed once, ε is drawn anew each time: a cache changes the time of a step and
nothing else. Each sample and prompt is encoded by itself, since bits depend on the batch, and a resumed run, which
meets others in its batches, has to get the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nara_diffusion.training.arguments import window_of
from nara_diffusion.training.engines import split_across_processes

from .dataset import TrainingSample
from .draws import draw_indices, draw_noise, drawable_levels, seeded_normal
from .family import Embeddings, Family, stack_padded
from .objectives import Corrupted, Objective, build_objective, squared_errors
from .pipelines import family_of

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------- cached latents and prompts


class TensorCache:
    """`cache.get(key, make)` are the tensors of `key`, on the CPU; it calls `make()` only if they aren't known.

    Args:
        memory_mib: bound on what is kept, in MiB; what comes after that is made at each use. In float32 a prompt of
            SDXL takes 620 KiB.
    """

    def __init__(self, memory_mib: float = 1024.0) -> None:
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
            logger.warning(
                "latents or prompts don't fit into memory: the rest is encoded at each use"
            )
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
        draws = [
            {"stream": f"posterior {sample.role}", "indices": [sample.position]}
            for sample in samples
        ]
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
    """

    def __init__(self, pipe: Any, family: Family | None = None) -> None:
        self.pipe, self.family, self.cache = pipe, family or family_of(pipe), TensorCache()

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
    return (
        (posterior.mean[:, :, 0], posterior.std[:, :, 0])
        if video
        else (posterior.mean, posterior.std)
    )


def scale_latents(vae: Any, z: Tensor) -> Tensor:
    """z (b, c, h, w) of an autoencoder → the latents that the denoiser reads.

    m and d are the configuration's `latents_mean` and `latents_std`, where it has them:

        AutoencoderKL          (z − shift_factor) · scaling_factor, or (z − m) · scaling_factor / d
        Wan's, Qwen-Image's    (z − m) / d
        FLUX.2's               patches of 2 × 2, (b, 4 c, h / 2, w / 2), then (z − μ) / √(v + ε) of its batch norm
    """
    if hasattr(vae, "bn"):
        mean, variance = (
            t.to(z.device, z.dtype).view(1, -1, 1, 1)
            for t in (vae.bn.running_mean, vae.bn.running_var)
        )
        patches = torch.nn.functional.pixel_unshuffle(z, 2)
        return (patches - mean) / (variance + vae.config.batch_norm_eps).sqrt()
    config = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    scale = getattr(config, "scaling_factor", None) or 1.0
    if mean is None or std is None:
        return (z - (getattr(config, "shift_factor", None) or 0.0)) * scale
    mean, std = (
        torch.tensor(value, dtype=z.dtype, device=z.device).view(1, -1, 1, 1)
        for value in (mean, std)
    )
    return (z - mean) * scale / std


# ---------------------------------------------------------------------- the loss


class DreamBoothLoss(NamedTuple):
    """A `StepLoss` of b samples."""

    loss: Tensor  # the scalar to differentiate, the mean of `per_sample`
    per_sample: (
        Tensor  # (b,), with the weighted loss of each sample's class image added, if there are any
    )
    noise_level: Tensor  # (b,), λ of the instance images


@dataclass(frozen=True)
class TrainingStep:
    """`step(batch)` is the loss of a batch that `collate_samples` made."""

    model: nn.Module  # an `AdaptedDenoiser`, as accelerate wrapped it
    objective: Objective
    latents: LatentCache
    prompts: PromptCache | None  # None where text encoders are trained
    device: torch.device  # where `model` runs
    seed: int  # of noise levels, noise and posterior samples
    group_size: int = 1  # samples of an optimizer step
    stratified: bool = False  # spread the noise levels of each optimizer step evenly
    noise_offset: float = 0.0  # κ of `draw_noise`
    prior_loss_weight: float = 1.0
    drawable: Tensor | None = (
        None  # the noise levels to draw from, (k,) of `drawable_levels`; None: all
    )

    def __call__(self, batch: Mapping[str, Any]) -> DreamBoothLoss:
        samples = batch["samples"]
        corrupted = self._corrupt(samples)
        losses = squared_errors(self._predict(corrupted, batch), corrupted)
        levels = self.objective.source.noise_level(corrupted.timestep)
        if samples[-1].role == "class":  # each loss has its own sample's min-SNR weight
            instance, prior = losses.chunk(2)
            losses, levels = instance + self.prior_loss_weight * prior, levels.chunk(2)[0]
        return DreamBoothLoss(losses.mean(), losses, levels)

    def _predict(self, corrupted: Corrupted, batch: Mapping[str, Any]) -> Tensor:
        """The prediction (b, c, h, w) of the model as it is."""
        inputs = (corrupted.model_input, corrupted.timestep, batch["time_ids"].to(self.device))
        if self.prompts is None:
            return self.model(*inputs, prompts=batch["prompts"])
        embeddings = tuple(part.to(self.device) for part in self.prompts.get(batch["prompts"]))
        return self.model(*inputs, embeddings=embeddings)

    def _corrupt(self, samples: Sequence[TrainingSample]) -> Corrupted:
        """Draws of one role have consecutive rows: all instances, then all class images."""
        latents = self.latents.sample(samples, seed=self.seed)  # (b, c, h, w)
        levels = torch.arange(self.objective.levels) if self.drawable is None else self.drawable
        indices, noise = [], []
        for role in dict.fromkeys(sample.role for sample in samples):
            positions = [sample.position for sample in samples if sample.role == role]
            spread: dict[str, Any] = {"stratified": self.stratified, "group_size": self.group_size}
            indices.append(draw_indices(positions, levels, seed=self.seed, role=role, **spread))
            noise.append(
                draw_noise(
                    positions,
                    latents.shape[1:],
                    seed=self.seed,
                    offset=self.noise_offset,
                    role=role,
                )
            )
        return self.objective.corrupt(
            latents.to(self.device), torch.cat(noise).to(self.device), torch.cat(indices)
        )


def training_step(
    args: Any, pipe: Any, family: Family, device: torch.device, group_size: int
) -> TrainingStep:
    """Return the loss of a run for the denoiser of `pipe`, which keeps predicting what its scheduler expects."""
    scheme = args.weighting_scheme
    objective = build_objective(
        pipe.scheduler, snr_gamma=args.snr_gamma, shift=args.flow_shift, weighting_scheme=scheme
    )
    density = {name: getattr(args, name) for name in ("logit_mean", "logit_std", "mode_scale")}
    return TrainingStep(
        model=getattr(pipe, family.denoiser),
        objective=objective,
        latents=LatentCache(pipe.vae),
        prompts=None if args.train_text_encoder else PromptCache(pipe, family),
        device=device,
        seed=args.seed,
        group_size=group_size,
        stratified=args.stratified_timesteps,
        noise_offset=args.noise_offset,
        prior_loss_weight=args.prior_loss_weight,
        drawable=drawable_levels(objective.noise_levels, window_of(args), scheme, **density),
    )


# ---------------------------------------------------------------------- the loss on held-out images


@dataclass(frozen=True)
class ValidationLoss:
    """The objective without weights, at equally spaced noise levels, on the same noise at every call."""

    objective: Objective  # with weights of 1
    latents: LatentCache
    samples: Sequence[TrainingSample]  # images to measure on
    family: Family  # with the conditions of the run
    seed: int  # of the noise
    points: int  # noise levels
    batch_size: int

    @property
    def indices(self) -> list[int]:
        """The middles of `points` equal parts of the schedule."""
        return [int((i + 0.5) * self.objective.levels / self.points) for i in range(self.points)]

    @property
    def noise_levels(self) -> Tensor:
        """λ (points,)."""
        return self.objective.noise_levels[self.indices]

    def curve(self, pipe: Any, accelerator: Accelerator) -> Tensor:
        """The loss (points, samples), with whatever adapter `pipe` has, samples ordered by size; on every process."""

        def work(points: Sequence[int]) -> list[list[float]]:
            return [self._at(pipe, self.indices[point]) for point in points]

        return torch.tensor(split_across_processes(accelerator, self.points, work))

    @torch.no_grad()
    def _at(self, pipe: Any, index: int) -> list[float]:
        denoiser, losses = getattr(pipe, self.family.denoiser), []
        device = denoiser.device
        for batch in self._batches():
            latents, indices = self.latents.mode(batch), torch.full((len(batch),), index)
            positions = [sample.position for sample in batch]
            noise = draw_noise(positions, latents.shape[1:], seed=self.seed, role="validation")
            corrupted = self.objective.corrupt(latents.to(device), noise.to(device), indices)
            embeddings = tuple(
                t.to(device) for t in self.family.encode(pipe, [sample.prompt for sample in batch])
            )
            time_ids = torch.tensor([sample.time_ids for sample in batch], device=device)
            inputs = (corrupted.model_input, corrupted.timestep)
            prediction = self.family.predict(denoiser, *inputs, time_ids, embeddings)
            losses += squared_errors(prediction, corrupted).tolist()
        return losses

    def _batches(self) -> list[list[TrainingSample]]:
        """Samples of one size each."""
        sizes = sorted({sample.target for sample in self.samples})
        of_size = [[sample for sample in self.samples if sample.target == size] for size in sizes]
        return [
            part[i : i + self.batch_size]
            for part in of_size
            for i in range(0, len(part), self.batch_size)
        ]
