"""The identity: ε, v, x and flow are one prediction read four ways, so that a base needs no training to give another.

At noise level i an objective shows x_i = p x + q ε and wants α x + β ε:

    objective         p      q           α            β
    epsilon           √ᾱ     √(1 − ᾱ)    0            1
    v_prediction      √ᾱ     √(1 − ᾱ)    −√(1 − ᾱ)    √ᾱ
    sample            √ᾱ     √(1 − ᾱ)    1            0
    flow_prediction   1 − σ  σ           −1           1

With the angle φ = atan(q / p), whose SNR is cot² φ, and z = x_i / √(p² + q²) = cos φ x + sin φ ε, the base sees z at
its timestep t with √ᾱ_t nearest to cos φ, and what it says there determines both terms:

    the base predicts   x̂                         ε̂
    epsilon             (z − sin φ ε̂) / cos φ     ε̂
    v_prediction        cos φ z − sin φ v̂         sin φ z + cos φ v̂
    sample              x̂                         (z − cos φ x̂) / sin φ

The reading is α x̂ + β ε̂. On the base's own schedule that of v from ε is v̂ = (ε̂ − √(1 − ᾱ_t) x_t) / √ᾱ_t, at the same
x_t and t. A φ outside of the base's schedule is clamped to its end: that is all that the identity leaves to train. At
zero terminal SNR it is the last steps, where ᾱ falls below the base's smallest; of a flow the first ones too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .discrete import DiscreteObjective
from .terms import Objective, column


class IdentityReading:
    """What a base model predicts, read as the prediction that an objective asks for.

        sample, timestep = reading.base_inputs(corrupted.model_input, indices)
        prediction = reading.prediction(corrupted.model_input, base(sample, timestep), indices)

    Args:
        base_scheduler: of the base; it has betas and predicts ε, v or x.
        objective: of the converted model.

    Attributes:
        kind: what the base predicts.
        timesteps: t (levels,) int64, by the objective's index.
        angles: φ (levels,) float64, clamped.
        clamped: (levels,) bool, where φ lies outside of the base's schedule.

    Raises:
        ValueError: a base of another kind.
    """

    def __init__(self, base_scheduler: Any, objective: Objective) -> None:
        base = DiscreteObjective(base_scheduler)
        self.kind = base.prediction_type
        angles = base_angles(base.alphas if self.kind != "epsilon" else base.alphas[base.alphas > 0])  # (N,)
        p, q, self._alpha, self._beta = coefficients(objective)
        wanted = torch.atan2(q, p)  # (levels,)
        self.angles = wanted.clamp(angles[0], angles[-1])
        self.timesteps = (self.angles[:, None] - angles).abs().argmin(1)  # (levels, N) → (levels,)
        self.clamped = (wanted - self.angles).abs() > 1e-6
        self._scale = torch.hypot(p, q).reciprocal()

    def base_inputs(self, model_input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """z (b, c, h, w) and t (b,), which the base takes.

        Args:
            model_input: x_i (b, c, h, w), as `objective.corrupt` makes it.
            indices: (b,), as `objective.corrupt` takes them.
        """
        rows = indices.cpu()
        scale = column(self._scale[rows]).to(model_input.device)
        return scale * model_input, self.timesteps[rows].to(model_input.device)

    def prediction(self, model_input: Tensor, base_prediction: Tensor, indices: Tensor) -> Tensor:
        """α x̂ + β ε̂ (b, c, h, w) float32, differentiable in the base's prediction.

        Args:
            model_input, indices: as for `base_inputs`.
            base_prediction: (b, c, h, w), what the base says of `base_inputs`, in any dtype.
        """
        device, rows = model_input.device, indices.cpu()
        sample, _ = self.base_inputs(model_input, indices)
        clean, noise = clean_and_noise(self.kind, sample, base_prediction, self.angles[rows].to(device))
        return column(self._alpha[rows]).to(device) * clean + column(self._beta[rows]).to(device) * noise


def clean_and_noise(kind: str, sample: Tensor, prediction: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """x̂ and ε̂ (b, c, h, w) float32, by the module's second table.

    Args:
        kind: what `prediction` is, one of `PREDICTION_TYPES`.
        sample: z (b, c, h, w).
        prediction: (b, c, h, w).
        angles: φ (b,) float64.
    """
    cos, sin = column(angles.cos()), column(angles.sin())  # (b, 1, 1, 1)
    sample, prediction = sample.float(), prediction.float()
    if kind == "epsilon":
        return (sample - sin * prediction) / cos, prediction
    if kind == "v_prediction":
        return cos * sample - sin * prediction, sin * sample + cos * prediction
    return prediction, (sample - cos * prediction) / sin


def base_angles(alphas: Tensor) -> Tensor:
    """φ (N,) of ᾱ (N,), both float64."""
    return torch.atan2((1 - alphas).sqrt(), alphas.sqrt())


def coefficients(objective: Objective) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p, q, α, β of the module's first table at each noise level of an objective, (levels,) float64 each.

    They are what it makes of x = 1, ε = 0 and of x = 0, ε = 1: both the input and the target are linear in x and ε.
    """
    one, nothing = torch.ones(objective.levels, 1, 1, 1), torch.zeros(objective.levels, 1, 1, 1)
    indices = torch.arange(objective.levels)
    of_clean, of_noise = objective.corrupt(one, nothing, indices), objective.corrupt(nothing, one, indices)
    p, q = of_clean.model_input, of_noise.model_input
    alpha, beta = of_clean.target.expand_as(p), of_noise.target.expand_as(p)
    return tuple(each.flatten().double() for each in (p, q, alpha, beta))  # type: ignore[return-value]
