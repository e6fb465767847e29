"""What an ε-, v- or x-model predicts, read as another prediction: no training is needed for that.

ε, v, x and the velocity of a rectified flow are one prediction, read four ways. At noise level i an objective shows
x_i = p x + q ε and asks for α x + β ε. With φ = atan(q / p), the base is shown

    z = x_i / √(p² + q²) = cos φ x + sin φ ε

at its own timestep of the nearest φ, and predicts a x̂ + b ε̂, where (a, b) is (0, 1) for ε, (−sin φ, cos φ) for v and
(1, 0) for x. The two equations give x̂ and ε̂, and so the reading:

    α x̂ + β ε̂ = ((α b − β a) z + (β cos φ − α sin φ) (a x̂ + b ε̂)) / (b cos φ − a sin φ)

A φ outside the base's schedule is clamped to its end. Only there does the reading leave something to train: the last
steps at zero terminal SNR, where ᾱ falls below the base's smallest, and both ends of a flow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .objectives import Objective, build_objective, rows


class IdentityReading:
    """What a base model predicts, read as the prediction that an objective asks for.

        prediction = reading.prediction(x, base(*reading.base_inputs(x, indices)), indices)

    Args:
        base_scheduler: the scheduler of the base; it has betas, and the base predicts ε, v or x.
        objective: what the prediction is read as.

    Attributes:
        timesteps: t (N,) int64, by the objective's index.
        angles: φ (N,) float64, clamped.
        clamped: (N,) bool, where φ lies outside of the base's schedule.

    Raises:
        ValueError: the base is of another kind.
    """

    def __init__(self, base_scheduler: Any, objective: Objective) -> None:
        base = build_objective(base_scheduler)
        self.kind, self.objective = base.prediction_type, objective
        angles = torch.atan2(base.q, base.p)  # (N,)
        if self.kind == "epsilon":
            angles = angles[base.p > 0]
        wanted = torch.atan2(objective.q, objective.p)
        self.angles = wanted.clamp(angles[0], angles[-1])
        self.timesteps = (self.angles[:, None] - angles).abs().argmin(1)
        self.clamped = (wanted - self.angles).abs() > 1e-6
        self._scale = torch.hypot(objective.p, objective.q).reciprocal()

    def base_inputs(self, model_input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """z (b, c, h, w) and t (b,), which the base takes, of x_i (b, c, h, w) and its indices (b,)."""
        timestep = self.timesteps[indices.cpu()].to(model_input.device)
        return rows(self._scale, indices, model_input) * model_input, timestep

    def prediction(self, model_input: Tensor, base_prediction: Tensor, indices: Tensor) -> Tensor:
        """α x̂ + β ε̂ (b, c, h, w) float32, differentiable in `base_prediction`, what the base says of `base_inputs`."""
        z, said = self.base_inputs(model_input, indices)[0].float(), base_prediction.float()
        values = (self.angles.cos(), self.angles.sin(), self.objective.alpha, self.objective.beta)
        cos, sin, alpha, beta = (rows(each, indices, model_input) for each in values)
        a, b = {"epsilon": (0.0, 1.0), "v_prediction": (-sin, cos), "sample": (1.0, 0.0)}[self.kind]
        return ((alpha * b - beta * a) * z + (beta * cos - alpha * sin) * said) / (
            b * cos - a * sin
        )
