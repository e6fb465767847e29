"""An ε-model of images learns to predict something else, from many pictures of one kind.

    loss = mean over ten bins of λ of ‖F(x_λ, λ) − target‖² / d          on pictures that no training sees

    eps_to_v      v = √ᾱ ε − √(1 − ᾱ) x           on the schedule that the base has
    eps_to_flow   u = ε − x                       on x_σ = (1 − σ) x + σ ε, timestep 1000 σ: a rectified flow
    zero_snr      v                               on that schedule rescaled so that ᾱ of the last timestep is 0
    eps           ε                               what the base was trained for
    noise_offset  ε + 0.3 δ, δ of a channel       the same under Diffusers' --noise_offset, as a share of the base's

The denoiser's argument stays a timestep of [0, 1000], so that λ = timestep / 1000 in each of them. In `ReadConversion`
the model keeps predicting ε, and the identity reads its prediction as what the regime asks for (nara_diffusion's
`IdentityReading`). All methods of a seed meet the same pictures in the same order, at the same noise levels, under the
same noise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean
from typing import Any, ClassVar, Protocol

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from nara_diffusion import TimestepNoise
from nara_diffusion.dreambooth import collate_samples
from nara_diffusion.dreambooth.dataset import DreamBoothDataset, draw_indices, draw_noise, seeded_normal
from nara_diffusion.dreambooth.image_records import ImageRecord, records_from_folder
from nara_diffusion.dreambooth.objectives import Corrupted, IdentityReading, Objective, build_objective, squared_errors
from nara_diffusion.dreambooth.pipelines import load_pipeline
from nara_diffusion.dreambooth.training_step import LatentCache, PromptCache
from quality.assets import ASSETS
from quality.images import drawn
from quality.images.held_out import (
    BACKBONE,
    BINS,
    SIZE,
    SUBJECTS,
    CleanBin,
    HeldOut,
    check_subject,
    clean_bin,
    held_out_losses,
    instance_prompt,
    predicted,
    records_of,
)
from quality.images.settings import adapted, arguments
from quality.images.training import ControlledDenoiser, shuffled_noise_levels

# ---------------------------------------------------------------------- objectives

CONVERSIONS = ("eps_to_v", "eps_to_flow", "zero_snr")
LEVELS = 1000

_CHANGES: dict[str, dict[str, Any]] = {
    "eps": {},
    "eps_to_v": {"prediction_type": "v_prediction"},
    "zero_snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}


def build_conversion(name: str, scheduler: Any) -> Objective:
    """The objective `name` for a base whose pipeline has `scheduler`.

    Raises:
        ValueError: there is no such objective.
    """
    if name == "eps_to_flow":
        flow = build_objective(FlowMatchEulerDiscreteScheduler())
        # σ = (i + 1) / N; λ is read from the timestep as of a discrete schedule
        return replace(flow, source=TimestepNoise("discrete"), timestep=torch.arange(1, LEVELS + 1))
    if name not in _CHANGES:
        raise ValueError(f"objective is {name!r}, expected one of {', '.join(('eps', *CONVERSIONS))}.")
    return build_objective(DDPMScheduler.from_config(scheduler.config, **_CHANGES[name]))


# ---------------------------------------------------------------------- data

SUBJECT = "toy"
POSES, PLACES = 150, 15
"""Pictures that a conversion learns from: in other poses, and in each of the ten places."""
FIRST = 1000  # number of the first of them; the held-out ones count from 0


@dataclass(frozen=True)
class RegimeData:
    """Attributes:
    pipe: the frozen base model; runs work on copies of its UNet.
    latents, prompts: caches.
    instances: what is learnt from.
    held_out: what the loss is measured on, one batch a bin of λ.
    """

    pipe: Any
    latents: LatentCache
    prompts: PromptCache
    instances: list[ImageRecord]
    held_out: list[CleanBin]


@cache
def conversion_data(subject: str = SUBJECT) -> RegimeData:
    """Many pictures: what changes is the form of the prediction, not what is drawn."""
    subject_drawn = drawn.SUBJECTS[subject]
    poses = drawn.in_poses(subject_drawn, range(FIRST, FIRST + POSES))
    places = drawn.in_places(subject_drawn, range(FIRST, FIRST + PLACES))
    return RegimeData(*_base(), records_of([*poses, *places]), _held_out(subject))


@cache
def subject_data(subject: str = SUBJECT) -> RegimeData:
    """The five pictures that DreamBooth has of a subject."""
    check_subject(subject)
    records = records_from_folder(ASSETS / SUBJECTS[subject], prompt=instance_prompt(subject), progress=False)
    return RegimeData(*_base(), records, _held_out(subject))


@cache
def base_pipeline() -> Any:
    """sdxl-tiny, in float32; never changed."""
    return load_pipeline(str(ASSETS / BACKBONE), dtype=torch.float32)


@cache
def _base() -> tuple[Any, LatentCache, PromptCache]:
    pipe = base_pipeline()
    prompts = PromptCache(pipe)
    return pipe, LatentCache(pipe.vae), prompts


@cache
def _held_out(subject: str) -> list[CleanBin]:
    _, latents, prompts = _base()
    return [clean_bin(latents, prompts, subject, index, LEVELS) for index in range(BINS)]


# ---------------------------------------------------------------------- backbones

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_CONVOLUTIONS = ("conv_in", "conv_out", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
_LINEAR = ("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
_TIME = ("time_emb_proj", "time_embedding.linear_1", "time_embedding.linear_2")


class Backbone(Protocol):
    """Attributes:
    targets: {name: modules that are adapted}.
    """

    targets: Mapping[str, tuple[str, ...]]

    def arguments(self, method: str, seed: int, options: Mapping[str, Any]) -> Any:
        """Those of a training: `options`, and defaults."""
        ...

    def adapted(self, method: str, args: Any) -> Any:
        """A copy of the base model, in which what `method` trains requires a gradient."""
        ...

    def controlled(self, model: Any, control: str | None, seed: int) -> nn.Module:
        """`model` as a regime's loss calls it, told the λ of a control."""
        ...


class UNetBackbone:
    """The UNet of sdxl-tiny; its targets "all" and "attention_time" have the time embedding, where a static adapter
    reads λ by itself."""

    targets: Mapping[str, tuple[str, ...]] = {
        "attention": _ATTENTION,
        "attention_time": (*_ATTENTION, *_TIME),
        "convolutions_time": (*_CONVOLUTIONS, *_TIME),
        "all": (*_ATTENTION, *_LINEAR, *_CONVOLUTIONS, *_TIME),
    }

    def arguments(self, method: str, seed: int, options: Mapping[str, Any]) -> Any:
        return arguments(SUBJECT, method, seed, dict(options))

    def adapted(self, method: str, args: Any) -> Any:
        return adapted(base_pipeline(), method, args)

    def controlled(self, model: Any, control: str | None, seed: int) -> ControlledDenoiser:
        return ControlledDenoiser(model, control)


class GainedBackbone(UNetBackbone):
    """The UNet as it is, but that the mean of each channel of its prediction has a gain, 1 + g(λ) of forty numbers."""

    def adapted(self, method: str, args: Any) -> Any:
        unet = copy.deepcopy(base_pipeline().unet).requires_grad_(False)
        unet.gain = nn.Parameter(torch.zeros(BINS, unet.config.out_channels))
        unet.register_forward_hook(_gained, with_kwargs=True)
        return unet


def _gained(unet: Any, args: tuple[Any, ...], options: Mapping[str, Any], output: Any) -> Any:
    said = output[0] if isinstance(output, tuple) else output.sample  # (b, c, h, w)
    timestep = options["timestep"] if "timestep" in options else args[1]
    gain = unet.gain[(BINS * timestep / LEVELS).long()]  # (b, c)
    said = said + (gain * said.mean((2, 3)))[..., None, None]
    return (said, *output[1:]) if isinstance(output, tuple) else type(output)(sample=said)


UNET = UNetBackbone()


# ---------------------------------------------------------------------- batches

Inputs = tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]
"""x_λ (b, c, h, w), timesteps (b,), time ids (b, 6), embeddings (b, l, d) and (b, p)."""


@dataclass(frozen=True)
class Batch:
    """Attributes:
    corrupted: of b samples.
    indices: (b,), of their noise levels.
    time_ids: (b, 6).
    embeddings: (b, l, d) and (b, p).
    shuffled: λ (b,) of other samples, for the ablation of that name.
    """

    corrupted: Corrupted
    indices: Tensor
    time_ids: Tensor
    embeddings: tuple[Tensor, Tensor]
    shuffled: Tensor

    @property
    def inputs(self) -> Inputs:
        """Of a denoiser."""
        return self.corrupted.model_input, self.corrupted.timestep, self.time_ids, self.embeddings


def batches(data: RegimeData, objective: Objective, args: Any, offset: float = 0.0) -> Callable[[int], Batch]:
    """The batch of step number n.

    Args:
        args: of train_scripts/dreambooth_sdxl.py; `seed` and `train_batch_size` are read.
        offset: of the noise.
    """
    size, seed = args.train_batch_size, args.seed
    dataset = DreamBoothDataset(data.instances, [SIZE], batch_size=size, seed=seed)

    def batch(number: int) -> Batch:
        positions = range(number * size, (number + 1) * size)
        samples = collate_samples([dataset[position] for position in positions])
        latents = data.latents.sample(samples["samples"], seed=seed)  # (b, c, h, w)
        levels = torch.arange(objective.levels)
        indices = draw_indices(positions, levels, seed=seed, stratified=True, group_size=size)
        noise = draw_noise(positions, latents.shape[1:], seed=seed, offset=offset)
        return Batch(
            objective.corrupt(latents, noise, indices),
            indices,
            samples["time_ids"],
            data.prompts.get(samples["prompts"]),
            shuffled_noise_levels(positions, seed, objective.levels, size),
        )

    return batch


# ---------------------------------------------------------------------- conversion


@dataclass(frozen=True)
class Conversion:
    """Attributes:
    objective_name: one of `CONVERSIONS`, what the model is converted to.
    load: of the pictures.
    offset: of the noise.
    """

    backbone: ClassVar[Backbone] = UNET
    objective_name: str
    load: Callable[[], RegimeData] = conversion_data
    offset: float = 0.0

    def loss(self, denoiser: ControlledDenoiser, args: Any) -> Callable[[int], Tensor]:
        """The loss of step number n."""
        data = self.load()
        batch_of = batches(data, build_conversion(self.objective_name, data.pipe.scheduler), args, self.offset)

        def loss(number: int) -> Tensor:
            batch = batch_of(number)
            denoiser.shuffled = batch.shuffled
            return squared_errors(denoiser(*batch.inputs), batch.corrupted).mean()

        return loss

    def held_out(self) -> list[HeldOut]:
        """One batch a bin of λ, the same for every method and seed."""
        data = self.load()
        objective = build_conversion(self.objective_name, data.pipe.scheduler)
        return [each.corrupted(objective) for each in with_offset(data.held_out, self.offset)]

    def figures(self, unet: Any) -> dict[str, Any]:
        """losses: of each bin; score: their mean, by which rates are chosen."""
        losses = [fmean(held_out_losses(unet, each)) for each in self.held_out()]
        return {"losses": losses, "score": fmean(losses)}


def with_offset(held_out: Sequence[CleanBin], offset: float) -> list[CleanBin]:
    """`held_out` with `offset` of a normal number of each picture and channel added to its noise."""
    bins = []
    for number, each in enumerate(held_out):
        count, channels = each.noise.shape[:2]
        drawn_by = {"seed": 0, "stream": f"held-out offset {number}", "indices": range(count)}
        bins.append(replace(each, noise=each.noise + offset * seeded_normal((channels, 1, 1), **drawn_by)))
    return bins


@dataclass(frozen=True)
class Offset(Conversion):
    """ε under a noise offset; losses are shares of the base's, in each bin."""

    objective_name: str = "eps"
    offset: float = 0.3

    def figures(self, unet: Any) -> dict[str, Any]:
        """losses: of each bin, as shares; score: their mean."""
        losses = super().figures(unet)["losses"]
        shares = [loss / base for loss, base in zip(losses, _base_losses(self), strict=True)]
        return {"losses": shares, "score": fmean(shares)}


@cache
def _base_losses(regime: Offset) -> list[float]:
    return Conversion.figures(regime, base_pipeline().unet)["losses"]


class GainedOffset(Offset):
    """By gains of the prediction's channels in place of an adapter."""

    backbone: ClassVar[Backbone] = GainedBackbone()


# ---------------------------------------------------------------------- reading


@dataclass(frozen=True)
class ReadConversion(Conversion):
    """The regime `objective_name`, by a model that predicts ε."""

    def _reading(self) -> tuple[Objective, IdentityReading]:
        scheduler = self.load().pipe.scheduler
        objective = build_conversion(self.objective_name, scheduler)
        return objective, IdentityReading(scheduler, objective)

    def loss(self, denoiser: ControlledDenoiser, args: Any) -> Callable[[int], Tensor]:
        """The loss of step number n."""
        objective, reading = self._reading()
        batch_of = batches(self.load(), objective, args)

        def loss(number: int) -> Tensor:
            batch = batch_of(number)
            shown, indices = batch.corrupted.model_input, batch.indices
            said = denoiser(*reading.base_inputs(shown, indices), batch.time_ids, batch.embeddings)
            return squared_errors(reading.prediction(shown, said, indices), batch.corrupted).mean()

        return loss

    def figures(self, unet: Any) -> dict[str, Any]:
        """losses: of each bin; score: their mean."""
        objective, reading = self._reading()
        losses = []
        for clean in self.load().held_out:
            held_out = clean.corrupted(objective)
            shown = held_out.batch.model_input
            sample, timestep = reading.base_inputs(shown, clean.indices)
            seen = replace(held_out, batch=replace(held_out.batch, model_input=sample, timestep=timestep))
            said = reading.prediction(shown, predicted(unet, seen), clean.indices)
            losses.append(squared_errors(said, held_out.batch).mean().item())
        return {"losses": losses, "score": fmean(losses)}
