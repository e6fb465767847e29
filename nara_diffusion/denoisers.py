"""λ from the timestep of a Diffusers denoiser: what each class means by it, and how its layers see the batch.

    convention   λ               the argument t of a denoiser
    timestep     t / N           discrete schedules, N = num_train_timesteps; fractional t of Karras sigmas too
    flow         σ               x_σ = (1 − σ) x + σ ε; t is N σ, σ, 1 − σ or N (1 − σ)
    edm          σ / (1 + σ)     x_σ = x + σ ε, t = ¼ ln σ (arXiv 2206.00364): the σ of the flow with as much noise

λ = 1 is pure noise in all of them. The convention's name is stored in an adapter (`noise_convention`) and checked when
a source of λ is set or an adapter is loaded. A class is looked up by its name, then by those of its base classes; some
classes serve models that mean different things, which their configuration tells apart (`_SETTLED_BY_CONFIG`). N is 1000
unless a pipeline's scheduler says otherwise where an adapter is trained or loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .noise import NoiseSignals, find_holders, is_differentiated
from .schedules import LARGEST_LOG_SIGMA, check_discrete
from .signals import arguments_of

NUM_TRAIN_TIMESTEPS = 1000
"""N of the schedules that the denoisers of Diffusers are trained with, where none is at hand; models do not hold it."""

_MEANINGS: dict[str, tuple[str, Callable[[Tensor, int], Tensor]]] = {
    "discrete": ("timestep", lambda t, n: t / n),
    "sigma_1000": ("flow", lambda t, n: t / n),
    "sigma": ("flow", lambda t, n: t),
    "data_1000": ("flow", lambda t, n: 1 - t / n),
    "data": ("flow", lambda t, n: 1 - t),
    # σ / (1 + σ) for σ = exp 4t
    "edm": ("edm", lambda t, n: torch.where(4 * t.abs() < LARGEST_LOG_SIGMA, torch.sigmoid(4 * t), torch.nan)),
}

CONVENTIONS = tuple(dict.fromkeys(convention for convention, _ in _MEANINGS.values()))
"""The names of λ's definitions above."""

_ROUNDING = 1e-4
"""How far λ may lie outside [0, 1]: SanaSprint's first σ is 1 + 4e-6."""


class TimestepNoise:
    """A source of λ (`nara_diffusion.set_noise_source`) that reads a denoiser's own timestep.

    A timestep may be a number, 0-d, (1,), (b,), or (b, …) with one value a token or frame, of which the noisiest
    counts: what is being denoised, since a given image or frame has no noise, or little.

    Args:
        meaning: "discrete" (t of a discrete schedule), "sigma_1000" (flow, N σ), "sigma" (flow, σ), "data_1000" and
            "data" (flow, N (1 − σ) and 1 − σ), "edm" (¼ ln σ).
        argument: the name of the argument of the denoiser's forward.
        num_train_timesteps: N of the schedule, 1000 nearly always.
        scale: what the pipeline multiplies the timestep with before it calls the denoiser (Sana's `timestep_scale`).

    Raises:
        ValueError: an unknown meaning, N below 1, or a scale that is not positive.
    """

    def __init__(
        self,
        meaning: str = "discrete",
        *,
        argument: str = "timestep",
        num_train_timesteps: int = NUM_TRAIN_TIMESTEPS,
        scale: float = 1.0,
    ) -> None:
        if meaning not in _MEANINGS:
            raise ValueError(f"meaning is {meaning!r}: choose one of {', '.join(map(repr, _MEANINGS))}.")
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps is {num_train_timesteps}: pass a positive number.")
        if not scale > 0:
            raise ValueError(f"scale is {scale}: pass a positive number.")
        self.meaning = meaning
        self.convention = _MEANINGS[meaning][0]
        self.argument = argument
        self.num_train_timesteps = num_train_timesteps
        self.scale = scale

    def noise_level(self, timestep: float | Tensor) -> Tensor:
        """λ (1,) or (b,), float32, of a timestep of any of the accepted shapes and dtypes.

        Raises:
            ValueError: an empty timestep, or one that does not have this meaning.
        """
        t = torch.as_tensor(timestep).float()
        if t.numel() == 0:
            raise ValueError(f"{self.argument} has shape {tuple(t.shape)}: expected a number, (batch,) or (batch, …).")
        _, to_noise_level = _MEANINGS[self.meaning]
        level = to_noise_level(t / self.scale, self.num_train_timesteps)
        level = level.flatten(1).amax(1) if level.dim() > 1 else level.reshape(-1)
        if not bool(((level >= -_ROUNDING) & (level <= 1 + _ROUNDING)).all()):
            raise ValueError(
                f"{self.argument} is {t.tolist()}, which as {self.meaning!r} is no λ in [0, 1]. If this pipeline means "
                "something else by it, say so: set_noise_source(model, TimestepNoise(meaning)), e.g. "
                'TimestepNoise("edm") where it passes ¼ ln σ.'
            )
        return level.clamp(0, 1)

    def check(self, timestep: float | Tensor) -> None:
        """Refuse a timestep that may mean something else; whoever makes a source has said what it means."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoiseSignals:
        """λ of one forward of `module`: (b,), or (1,) if all samples have the same.

        Raises:
            ValueError: the forward has no such argument, or see `noise_level` and `check`.
        """
        timestep = arguments_of(module, args, kwargs).get(self.argument)
        if timestep is None:
            raise ValueError(f"λ can't be read: this forward of {type(module).__name__} got no {self.argument}.")
        level = self.noise_level(timestep)
        self.check(timestep)
        # one C for all, where pipelines expand a timestep to the batch: parts of the batch, as PAG's, may see it too
        shared = not is_differentiated(level) and bool((level == level[0]).all())
        return NoiseSignals(level[:1] if shared else level)


class UndeclaredTimestep(TimestepNoise):
    """The source that a denoiser's class is given, until somebody declares what its pipeline passes.

    A small timestep of a discrete schedule is then taken for one only if it can't be ¼ ln σ: see `check_discrete`.
    """

    def check(self, timestep: float | Tensor) -> None:
        if self.meaning == "discrete":
            check_discrete(timestep, self.argument)

    def of_schedule(self, scheduler: Any) -> UndeclaredTimestep:
        """The same with the N of a scheduler of Diffusers, if that has one."""
        steps = scheduler.config.get("num_train_timesteps") or self.num_train_timesteps
        return UndeclaredTimestep(self.meaning, argument=self.argument, num_train_timesteps=steps, scale=self.scale)


def count_timesteps(model: nn.Module, scheduler: Any) -> None:
    """Let the adapters of `model` read λ by the N of this scheduler of Diffusers, unless somebody has set a source."""
    for holder in find_holders(model):
        if isinstance(holder.source, UndeclaredTimestep):
            holder.source = holder.source.of_schedule(scheduler)


@dataclass(frozen=True)
class Denoiser:
    """What is known of a class of denoisers.

    Attributes:
        meaning, argument, scale: see `TimestepNoise`.
        sample_major: whether layers may see b · k rows, k consecutive ones a sample (frames, positions, tokens),
            where the model sees b. Otherwise another number of rows than the batch's is an error.
    """

    meaning: str = "discrete"
    argument: str = "timestep"
    sample_major: bool = False
    scale: float = 1.0

    def source(self, convention: str | None = None) -> TimestepNoise:
        """What reads λ from its timestep, for adapters whose λ is defined as `convention` (None: as the class does).

        Models of discrete schedules are trained in EDM's terms too, or converted to a rectified flow: an adapter that
        says so is read so.
        """
        meaning = self.meaning
        if meaning == "discrete":
            meaning = {"edm": "edm", "flow": "sigma_1000"}.get(convention or "", meaning)
        return UndeclaredTimestep(meaning, argument=self.argument, scale=self.scale)


_DENOISERS: dict[str, Denoiser] = {
    "UNet2DConditionModel": Denoiser(),
    "UNetMotionModel": Denoiser(sample_major=True),
    "UNet3DConditionModel": Denoiser(sample_major=True),
    "PixArtTransformer2DModel": Denoiser(),
    "HunyuanDiT2DModel": Denoiser(sample_major=True),  # tokens of the text, in its embedder
    "CogVideoXTransformer3DModel": Denoiser(sample_major=True),  # frames, in its patch embedder
    "CogView4Transformer2DModel": Denoiser(),  # a flow whose σ is shifted and whose timestep is not
    "SD3Transformer2DModel": Denoiser("sigma_1000"),
    "SanaTransformer2DModel": Denoiser("sigma_1000"),
    "HunyuanVideoTransformer3DModel": Denoiser("sigma_1000"),
    "WanTransformer3DModel": Denoiser("sigma_1000", sample_major=True),  # timesteps of tokens
    "LTXVideoTransformer3DModel": Denoiser("sigma_1000", sample_major=True),  # timesteps of tokens
    "HiDreamImageTransformer2DModel": Denoiser("sigma_1000", argument="timesteps"),
    "FluxTransformer2DModel": Denoiser("sigma"),
    "Flux2Transformer2DModel": Denoiser("sigma"),
    "ChromaTransformer2DModel": Denoiser("sigma"),
    "QwenImageTransformer2DModel": Denoiser("sigma"),
    "Krea2Transformer2DModel": Denoiser("sigma", sample_major=True),  # tokens of the text, in its text fusion
    "AuraFlowTransformer2DModel": Denoiser("sigma"),
    "CosmosTransformer3DModel": Denoiser("sigma", sample_major=True),  # timesteps of frames
    "LuminaNextDiT2DModel": Denoiser("data"),
    "Lumina2Transformer2DModel": Denoiser("data"),
    "ZImageTransformer2DModel": Denoiser("data", argument="t"),
    "MochiTransformer3DModel": Denoiser("data_1000", sample_major=True),  # frames, in its patch embedder
}


def _settle_sana(denoiser: Denoiser, config: Any) -> Denoiser:
    """SanaSprint, which alone is conditioned on guidance, is given σ; other Sanas 1000 σ · timestep_scale."""
    return (
        replace(denoiser, meaning="sigma") if config.guidance_embeds else replace(denoiser, scale=config.timestep_scale)
    )


def _settle_cosmos(denoiser: Denoiser, config: Any) -> Denoiser:
    """Cosmos 1, which alone learns positions, is given ¼ ln σ of EDM; Cosmos 2 and 2.5 the σ of the flow."""
    return replace(denoiser, meaning="edm") if config.extra_pos_embed_type == "learnable" else denoiser


_SETTLED_BY_CONFIG: dict[str, Callable[[Denoiser, Any], Denoiser]] = {
    "SanaTransformer2DModel": _settle_sana,
    "CosmosTransformer3DModel": _settle_cosmos,
}


def register_denoiser(
    class_name: str, meaning: str = "discrete", *, argument: str = "timestep", sample_major: bool = False
) -> None:
    """Declare what the timestep of a class of denoisers means, before adapters are added to one.

        register_denoiser("MyTransformer2DModel", "sigma")

    Args: see `TimestepNoise` and `Denoiser`.

    Raises:
        ValueError: an unknown meaning, or the class is declared otherwise already.
    """
    TimestepNoise(meaning)
    denoiser = Denoiser(meaning, argument, sample_major)
    if _DENOISERS.setdefault(class_name, denoiser) != denoiser:
        raise ValueError(
            f"{class_name} is declared already, as {_DENOISERS[class_name]}: give a model that means something else a "
            "source of its own, set_noise_source(model, TimestepNoise(meaning))."
        )


def denoiser_of(model: nn.Module) -> Denoiser | None:
    """What is known of the class of `model`, or None if it is no denoiser that anybody declared."""
    name = next((kind.__name__ for kind in type(model).__mro__ if kind.__name__ in _DENOISERS), None)
    if name is None:
        return None
    settle = _SETTLED_BY_CONFIG.get(name)
    return _DENOISERS[name] if settle is None else settle(_DENOISERS[name], model.config)
