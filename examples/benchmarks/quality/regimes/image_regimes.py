"""An ε-model of images learns to predict something else, from many pictures of one kind.

    loss = mean over ten bins of λ of ‖F(x_λ, λ) − target‖² / d          on pictures that no training sees

    eps_to_v      v = √ᾱ ε − √(1 − ᾱ) x           on the schedule that the base has
    eps_to_flow   u = ε − x                       on x_σ = (1 − σ) x + σ ε, timestep 1000 σ: a rectified flow
    zero_snr      v                               on that schedule rescaled so that ᾱ of the last timestep is 0
    eps           ε                               what the base was trained for

The denoiser's argument stays a timestep of [0, 1000], so that λ = timestep / 1000 in each of them. In `ReadConversion`
the model keeps predicting ε, and the identity reads its prediction as what the regime asks for (nara_diffusion's
`IdentityReading`). All methods of a seed meet the same pictures in the same order, at the same noise levels, under the
same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from statistics import fmean
from typing import Any, ClassVar, Protocol

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from identity_reading import IdentityReading
from torch import Tensor, nn

from nara_diffusion import TimestepNoise
from nara_diffusion.dreambooth import collate_samples
from nara_diffusion.dreambooth.dataset import DreamBoothDataset
from nara_diffusion.dreambooth.draws import draw_indices, draw_noise
from nara_diffusion.dreambooth.image_records import ImageRecord
from nara_diffusion.dreambooth.objectives import Objective, build_objective, squared_errors
from quality.images.held_out import (
    DRAWN,
    LEVELS,
    SIZE,
    Shown,
    base,
    clean_bins,
    in_places,
    in_poses,
    records_of,
)
from quality.images.training import ControlledDenoiser, adapted, arguments, shuffled_noise_levels

# ---------------------------------------------------------------------- objectives

CONVERSIONS = ("eps_to_v", "eps_to_flow", "zero_snr")

_CHANGES: dict[str, dict[str, Any]] = {
    "eps": {},
    "eps_to_v": {"prediction_type": "v_prediction"},
    "zero_snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}


@cache
def build_conversion(name: str) -> Objective:
    """The objective `name` for the base."""
    if name == "eps_to_flow":
        flow = build_objective(FlowMatchEulerDiscreteScheduler())
        # σ = (i + 1) / N; λ is read from the timestep as of a discrete schedule
        return replace(flow, source=TimestepNoise("discrete"), timestep=torch.arange(1, LEVELS + 1))
    return build_objective(DDPMScheduler.from_config(base().pipe.scheduler.config, **_CHANGES[name]))


# ---------------------------------------------------------------------- data

SUBJECT = "toy"
POSES, PLACES = 150, 15
"""Pictures that a conversion learns from: in other poses, and in each of the ten places."""
FIRST = 1000  # number of the first of them; the held-out ones count from 0


@cache
def conversion_pictures() -> list[ImageRecord]:
    """Many pictures: what changes is the form of the prediction, not what is drawn."""
    poses = in_poses(DRAWN[SUBJECT], range(FIRST, FIRST + POSES))
    return records_of([*poses, *in_places(DRAWN[SUBJECT], range(FIRST, FIRST + PLACES))])


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
        return adapted(method, args)

    def controlled(self, model: Any, control: str | None, seed: int) -> ControlledDenoiser:
        return ControlledDenoiser(model, control)


UNET = UNetBackbone()


# ---------------------------------------------------------------------- regimes


@dataclass(frozen=True)
class Conversion:
    """Attributes:
    objective_name: one of `CONVERSIONS`, what the model is converted to, or "eps".
    load: of the pictures that are learnt from.
    offset: of the noise.
    """

    backbone: ClassVar[Backbone] = UNET
    objective_name: str
    load: Callable[[], list[ImageRecord]] = conversion_pictures
    offset: float = 0.0

    @property
    def objective(self) -> Objective:
        return build_conversion(self.objective_name)

    def batches(self, args: Any) -> Callable[[int], Shown]:
        """The batch of step number n.

        Args:
            args: of train_scripts/dreambooth_sdxl.py; `seed` and `train_batch_size` are read.
        """
        size, seed = args.train_batch_size, args.seed
        dataset = DreamBoothDataset(self.load(), [SIZE], batch_size=size, seed=seed)

        def batch(number: int) -> Shown:
            positions = range(number * size, (number + 1) * size)
            samples = collate_samples([dataset[position] for position in positions])
            latents = base().latents.sample(samples["samples"], seed=seed)  # (b, c, h, w)
            levels = torch.arange(self.objective.levels)
            indices = draw_indices(positions, levels, seed=seed, stratified=True, group_size=size)
            noise = draw_noise(positions, latents.shape[1:], seed=seed, offset=self.offset)
            corrupted = self.objective.corrupt(latents, noise, indices)
            return Shown(corrupted, indices, samples["time_ids"], base().prompts.get(samples["prompts"]))

        return batch

    def loss(self, denoiser: ControlledDenoiser, args: Any) -> Callable[[int], Tensor]:
        """The loss of step number n."""
        batch_of, size = self.batches(args), args.train_batch_size

        def loss(number: int) -> Tensor:
            positions, batch = range(number * size, (number + 1) * size), batch_of(number)
            denoiser.shuffled = shuffled_noise_levels(positions, args.seed, self.objective.levels, size)
            return squared_errors(self.prediction(denoiser, batch), batch.batch).mean()

        return loss

    def prediction(self, denoiser: nn.Module, shown: Shown) -> Tensor:
        """Of what the regime asks for, (b, c, h, w)."""
        return denoiser(*shown.inputs)

    def held_out(self) -> list[Shown]:
        """One batch a bin of λ, the same for every method and seed."""
        return [clean.corrupted(self.objective) for clean in clean_bins(SUBJECT)]

    @torch.no_grad()
    def figures(self, unet: Any) -> dict[str, Any]:
        """losses: of each bin; score: their mean, by which rates are chosen."""
        denoiser, held_out = ControlledDenoiser(unet, None), self.held_out()
        losses = [squared_errors(self.prediction(denoiser, noisy), noisy.batch).mean().item() for noisy in held_out]
        return {"losses": losses, "score": fmean(losses)}


@dataclass(frozen=True)
class ReadConversion(Conversion):
    """The regime `objective_name`, by a model that predicts ε."""

    @cached_property
    def reading(self) -> IdentityReading:
        return IdentityReading(base().pipe.scheduler, self.objective)

    def prediction(self, denoiser: nn.Module, shown: Shown) -> Tensor:
        """What the identity makes of the model's, (b, c, h, w)."""
        seen = shown.batch.model_input
        said = denoiser(*self.reading.base_inputs(seen, shown.indices), shown.time_ids, shown.embeddings)
        return self.reading.prediction(seen, said, shown.indices)
