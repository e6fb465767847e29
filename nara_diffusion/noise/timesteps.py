"""Convert a timestep or a sigma to λ. Only this module does so.

    convention   λ               the argument t of a denoiser
    timestep     t / N           discrete schedules, N = num_train_timesteps; t may be fractional
                                 (Karras sigmas); continuous schedules pass t / N itself
    flow         σ               x_σ = (1 − σ) x + σ ε; t is N σ, σ, 1 − σ or N (1 − σ)
    edm          σ / (1 + σ)     x_σ = x + σ ε, t = ¼ ln σ (arXiv 2206.00364) or 2/π atan σ; this λ
                                 is the σ of the flow with as much noise

λ = 1 is pure noise in all of them. N comes from the source if the user has set one, otherwise from
the current schedulers of the pipelines that loaded an adapter. Without either, N is 1000.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .level import arguments_of, as_tensor, host_values, nan_outside, one_if_expanded
from .parts import FrameTokens

LARGEST_LOG_SIGMA = math.log(1e6)
"""No schedule has a σ above 10⁶, so a timestep above ¼ ln 10⁶ ≈ 3.5 belongs to a discrete one."""


def _of_angle(angle: Tensor) -> Tensor:
    return torch.sin(angle) / (torch.sin(angle) + torch.cos(angle))  # σ / (1 + σ), σ = tan angle


_MEANINGS: dict[str, tuple[str, Callable[[Tensor, int], Tensor]]] = {
    "discrete": ("timestep", lambda t, n: t / n),
    "sigma_1000": ("flow", lambda t, n: t / n),
    "sigma": ("flow", lambda t, n: t),
    "data_1000": ("flow", lambda t, n: 1 - t / n),
    "data": ("flow", lambda t, n: 1 - t),
    "ratio": ("timestep", lambda t, n: t),
    "angle": ("edm", lambda t, n: _of_angle(t * torch.pi / 2)),
    # σ / (1 + σ) for σ = exp 4t
    "edm": (
        "edm",
        lambda t, n: torch.where(4 * t.abs() < LARGEST_LOG_SIGMA, torch.sigmoid(4 * t), torch.nan),
    ),
}
_PASSED: dict[str, Callable[[Tensor], Tensor]] = {
    "sigma": lambda t: t / 1000,
    "data": lambda t: (1000 - t) / 1000,
}
"""Meaning → how pipelines convert their scheduler's t before they pass it. Others pass t itself."""
COUNTED = ("discrete", "sigma_1000", "data_1000")
"""The meanings with a λ that depends on N."""


_HALF = (torch.bfloat16, torch.float16)
_ROUNDING = 1e-4
"""How far λ may lie outside [0, 1]: SanaSprint's first σ is 1 + 4e-6."""


@dataclass(eq=False)
class TimestepNoise:
    """Compute λ from a denoiser's own timestep; pass it to `nara_diffusion.set_noise_source`.

    A timestep may be a number, 0-d, (1,), (b,), or (b, …) with one value for each token or frame.
    If a sample has several values and `frames` says where the layers see the frames, each frame
    takes the λ of its noisiest token. Otherwise the sample takes the λ of its noisiest token or
    frame. This is what is being denoised; a conditioning image or frame has little or no noise.

    Args:
        meaning: "discrete" (t of a discrete schedule), "ratio" (t / N of one), "sigma_1000" (flow,
            N σ), "sigma" (flow, σ), "data_1000" and "data" (flow, N (1 − σ) and 1 − σ), "edm"
            (¼ ln σ), "angle" (EDM, 2/π atan σ).
        argument: the name of the timestep argument of the denoiser's forward.
        num_train_timesteps: N of the schedule, nearly always 1000.
        scale: the factor that the pipeline applies to the timestep before it calls the denoiser
            (Sana's `timestep_scale`).
        also: names of further arguments with the same meaning, such as the timesteps of sound or
            actions in a video model. Any of them may be missing. The noisiest timestep counts.
        packed: whether the n values of a timestep (n,) belong to one packed sequence rather than to
            a batch, either one for each token or each distinct value once.
        pinned: (argument, value, t). If the forward's argument of this name has this value, the
            denoiser runs at t, whatever its timestep is.
        frames: where the layers see the frames of a video. If this is None and the denoiser is in
            the table, the table's entry is used.

    Attributes:
        convention: the name of the definition of λ: "timestep", "flow" or "edm".

    Raises:
        ValueError: the meaning is unknown.
    """

    meaning: str = "discrete"
    _: KW_ONLY
    argument: str = "timestep"
    num_train_timesteps: int = 1000
    scale: float = 1.0
    also: tuple[str, ...] = ()
    packed: bool = False
    pinned: tuple[str, Any, float] | None = None
    frames: FrameTokens | None = None
    convention: str = field(init=False)

    def __post_init__(self) -> None:
        if self.meaning not in _MEANINGS:
            raise ValueError(
                f"meaning is {self.meaning!r}: choose one of {', '.join(map(repr, _MEANINGS))}."
            )
        self.convention = _MEANINGS[self.meaning][0]

    def noise_level(self, timestep: float | Tensor) -> Tensor:
        """Return λ (1,) or (b,), float32, for a timestep of any accepted shape and dtype.

        Raises:
            ValueError: λ is outside [0, 1]. If the timestep is not on the CPU, λ is NaN instead.
        """
        t = as_tensor(timestep).float()
        level = _MEANINGS[self.meaning][1](t / self.scale, self.num_train_timesteps)
        if self.packed:
            level = level.max()
        level = level.flatten(1).amax(1) if level.dim() > 1 else level.reshape(-1)
        values = host_values(level)
        if values is None:
            level = nan_outside(level, _ROUNDING)
        elif not all(-_ROUNDING <= value <= 1 + _ROUNDING for value in values):
            counted = f" with N = {self.num_train_timesteps}" if self.meaning in COUNTED else ""
            raise ValueError(
                f"{self.argument} is {t.tolist()}, which gives a λ outside [0, 1] if it means "
                f"{self.meaning!r}{counted}. If it means something else, declare that by "
                'set_noise_source(model, TimestepNoise(meaning)), e.g. TimestepNoise("edm") for ¼ ln σ.'
            )
        return level.clamp(0, 1)

    def unrounded(self, timestep: Tensor, schedule: Tensor) -> Tensor:
        """Return, in float32, the timestep that a pipeline rounded to `timestep`.

        If none or several timesteps of the schedule round to `timestep`, return it unchanged. FLUX,
        Qwen-Image and others cast t to the dtype of their latents, which moves λ by up to 0.4 % in
        bfloat16. No values are copied to the host.

        Args:
            timestep: a tensor of any shape, in half precision.
            schedule: the timesteps of the pipeline's scheduler, (n,) float32 on the same device.
        """
        passed = _PASSED.get(self.meaning, lambda t: t)
        exact = passed(schedule) * self.scale  # (n,)
        cast_first = passed(schedule.to(timestep.dtype)) * self.scale
        rounded = timestep[..., None]
        is_meant = (exact.to(timestep.dtype) == rounded) | (cast_first == rounded)  # (…, n)
        lowest = exact.where(is_meant, torch.inf).amin(-1)
        highest = exact.where(is_meant, -torch.inf).amax(-1)
        return lowest.where(lowest == highest, timestep.float())

    def checked(self, level: Tensor, timestep: float | Tensor) -> Tensor:
        """Return `level` unchanged for any timestep, since the user has declared its meaning.

        `DenoiserNoise` overrides this and raises an error for ambiguous timesteps.
        """
        return level

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return λ for one forward of `module`: (b,), or (1,) if all samples share one timestep.

        λ is (b, k) or (1, k) for k frames with separate timesteps. The samples share one timestep
        if it is a number, 0-d, (1,), or expanded to the batch.
        """
        arguments = arguments_of(module, args, kwargs)
        inputs = [arguments.get(name) for name in (self.argument, *self.also)]
        timesteps = [one_if_expanded(as_tensor(value)) for value in inputs if value is not None]
        # a noise-free conditioning video has no timesteps; only its sound has
        timesteps = [t for t in timesteps if t.numel()] or timesteps
        if self.pinned is not None and arguments.get(self.pinned[0]) == self.pinned[1]:
            timesteps = [as_tensor(self.pinned[2])]
        if not timesteps:
            names = " and no ".join((self.argument, *self.also))
            raise ValueError(
                f"λ can't be read: this forward of {type(module).__name__} got no {names}."
            )
        by_frame = (
            None if self.frames is None else self.frames.by_frame(timesteps[0], module, arguments)
        )
        if by_frame is not None:
            level = self.noise_level(by_frame.flatten(0, 1)).view(by_frame.shape[:2])
        else:
            level = functools.reduce(torch.maximum, map(self.noise_level, timesteps))
        return self.checked(level, timesteps[0])


@dataclass
class DenoiserNoise(TimestepNoise):
    """The default source of λ of a denoiser class, and how the layers of the class see the batch.

    N comes from the current schedulers. A small timestep is ambiguous:

        discrete   t in [0, N], N = 1000: whole, or fractional with Karras sigmas; below 3.5 only in
                   the last steps
        EDM        t = ¼ ln σ: always within ±3.5; from 1.1 to 0 in the first steps, σ from 80 to 1

    If an EDM timestep were read as a discrete one, the first steps would run at λ = 0.001. A small
    timestep therefore raises an error, unless a current scheduler is discrete, or there is no
    scheduler and the timestep is a whole number.

    Attributes:
        sample_major: whether layers may see b · k rows, k consecutive rows for each sample, while
            the model sees b. If False, any number of rows other than the batch size is an error.
        tiled: whether these are instead all samples, k times over.
        one_level: whether the first axis of the layers' inputs is not the sample axis. If True, a
            batch with different values of λ raises an error.
        schedulers: the schedulers of the pipelines that loaded the adapters; see `under`.
    """

    sample_major: bool = False
    tiled: bool = False
    one_level: bool = False
    schedulers: Sequence[Any] = ()

    def read_as(self, convention: str | None) -> DenoiserNoise:
        """Return this source, with the meaning of the timestep that `convention` requires.

        Models with a discrete schedule can also be trained with EDM timesteps, or converted to a
        rectified flow.
        """
        meanings = {"edm": "edm", "flow": "sigma_1000"} if self.meaning == "discrete" else {}
        return replace(self, meaning=meanings.get(convention or "", self.meaning))

    def under(self, schedulers: Sequence[Any]) -> DenoiserNoise:
        """Return this source with the current schedulers of the pipelines, and their N.

        Raises:
            ValueError: λ depends on N, and the schedulers have different N.
        """
        lengths = {
            length for one in schedulers if (length := one.config.get("num_train_timesteps"))
        }
        if self.meaning not in COUNTED or not lengths:
            return replace(self, schedulers=schedulers)
        if len(lengths) > 1:
            raise ValueError(
                f"λ = {self.argument} / N can't be read: the schedulers of the pipelines that loaded the adapters have "
                f"{' and '.join(f'N = {length}' for length in sorted(lengths))}. Choose one: "
                f"set_noise_source(model, TimestepNoise({self.meaning!r}, num_train_timesteps=N))."
            )
        return replace(self, schedulers=schedulers, num_train_timesteps=lengths.pop())

    def noise_level(self, timestep: float | Tensor) -> Tensor:
        """Return λ of a timestep.

        If a pipeline rounded the timestep to half precision, use the scheduler's exact timestep.
        """
        timesteps = [getattr(scheduler, "timesteps", None) for scheduler in self.schedulers]
        schedules = [t.flatten() for t in timesteps if isinstance(t, Tensor)]
        if schedules and isinstance(timestep, Tensor) and timestep.dtype in _HALF:
            device = timestep.device
            is_async = device.type != "cpu"  # copies to the CPU must block
            there = [t.to(device, torch.float32, non_blocking=is_async) for t in schedules]
            timestep = self.unrounded(timestep, torch.cat(there))
        return super().noise_level(timestep)

    def checked(self, level: Tensor, timestep: float | Tensor) -> Tensor:
        """Return `level` if the timestep can be read as discrete.

        Raises:
            ValueError: the timestep is small and therefore ambiguous. If it is not on the CPU, λ is
                NaN instead, unless all schedulers are continuous.
        """
        t = as_tensor(timestep).detach()
        continuous = [type(one).__name__ for one in self.schedulers if passes_log_sigma(one)]
        are_discrete = self.schedulers and not continuous
        if self.meaning != "discrete" or not t.is_floating_point() or are_discrete:
            return level
        is_discrete = (4 * t.float().abs() >= LARGEST_LOG_SIGMA).any()
        if not continuous:
            is_discrete = is_discrete | (t == t.round()).all()
        value = host_values(is_discrete)
        all_continuous = 0 < len(continuous) == len(self.schedulers)
        if value is None and not all_continuous:
            return level.where(is_discrete, torch.nan)
        if value == [True]:
            return level
        timesteps = host_values(t) or f"{t.dtype} on {t.device}"
        who = f"{continuous[0]} passes" if continuous else "it may be"
        raise ValueError(
            f"{self.argument} is {timesteps}, which as 'discrete' would be almost no noise, but {who} ¼ ln σ of an "
            'EDM schedule. Declare its meaning once: set_noise_source(model, TimestepNoise("edm")) or '
            'TimestepNoise("discrete").'
        )


FLOW = "flow_prediction"


def prediction_type(scheduler: Any) -> str | None:
    """Return the prediction that a Diffusers scheduler expects, as in `prediction_type`, if any."""
    is_flow = type(scheduler).__name__.startswith("FlowMatch")
    return FLOW if is_flow else scheduler.config.get("prediction_type")


def passes_log_sigma(scheduler: Any) -> bool:
    """Return whether a Diffusers scheduler passes ¼ ln σ to the denoiser as the timestep."""
    settings = (scheduler.config.get("timestep_type"), scheduler.config.get("prediction_type"))
    return type(scheduler).__name__.startswith("EDM") or settings == ("continuous", "v_prediction")
