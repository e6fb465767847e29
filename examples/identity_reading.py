"""Convert the prediction of an ε-, v- or x-model to another prediction type, without training.

ε, v, x and the velocity of a rectified flow are equivalent predictions. At noise level i, an
objective shows x_i = p x + q ε and asks for α x + β ε. With φ = atan(q / p), the base model sees

    z = x_i / √(p² + q²) = cos φ x + sin φ ε

at its own timestep with the nearest φ. It predicts a x̂ + b ε̂, with (a, b) = (0, 1) for ε,
(−sin φ, cos φ) for v and (1, 0) for x. The two equations determine x̂ and ε̂, and therefore:

    α x̂ + β ε̂ = ((α b − β a) z + (β cos φ − α sin φ) (a x̂ + b ε̂)) / (b cos φ − a sin φ)

A φ outside the base's schedule is clamped to the end of the schedule. Only there is something left
to train: in the last steps of a schedule with zero terminal SNR, since ᾱ is below the base's
smallest value, and at both ends of a flow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nara_diffusion.dreambooth.objectives import Objective, build_objective, rows


class IdentityReading:
    """Convert the prediction of a base model to the prediction that an objective asks for.

        import torch
        from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
        from identity_reading import IdentityReading

        from nara_diffusion.dreambooth.objectives import build_objective

        pipe = DiffusionPipeline.from_pretrained("examples/assets/sdxl-tiny", dtype=torch.float32)
        reading = IdentityReading(pipe.scheduler, build_objective(FlowMatchEulerDiscreteScheduler()))
        x, indices = torch.randn(2, 4, 16, 16), torch.tensor([250, 700])  # x_σ at σ = (index + 1) / 1000
        z, timestep = reading.base_inputs(x, indices)  # what the base is given
        states, _, pooled, _ = pipe.encode_prompt(["a toy", "a toy"], do_classifier_free_guidance=False)
        conditions = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
        epsilon = pipe.unet(z, timestep, states, added_cond_kwargs=conditions).sample
        velocity = reading.prediction(x, epsilon, indices)  # ε − x₀, (2, 4, 16, 16)

    Args:
        base_scheduler: the scheduler of the base model, with betas and a prediction of ε, v or x.
        objective: the objective that defines the new prediction.

    Attributes:
        timesteps: t (N,) int64, indexed by the objective's noise level.
        angles: φ (N,) float64, clamped.
        clamped: (N,) bool, True if φ is outside the schedule of the base model.

    Raises:
        ValueError: the scheduler has no betas, or the base model has another prediction type.
    """

    def __init__(self, base_scheduler: Any, objective: Objective) -> None:
        base = build_objective(base_scheduler)
        self.kind = base.prediction_type
        self.objective = objective
        angles = torch.atan2(base.q, base.p)  # (N,)
        if self.kind == "epsilon":
            angles = angles[base.p > 0]
        target_angle = torch.atan2(objective.q, objective.p)
        self.angles = target_angle.clamp(angles[0], angles[-1])
        self.timesteps = (self.angles[:, None] - angles).abs().argmin(1)
        self.clamped = (target_angle - self.angles).abs() > 1e-6
        self._scale = torch.hypot(objective.p, objective.q).reciprocal()

    def base_inputs(self, model_input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return z (b, c, h, w) and t (b,) for the base, from x_i (b, c, h, w) and i (b,)."""
        timestep = self.timesteps[indices.cpu()].to(model_input.device)
        return rows(self._scale, indices, model_input) * model_input, timestep

    def prediction(self, model_input: Tensor, base_prediction: Tensor, indices: Tensor) -> Tensor:
        """Return α x̂ + β ε̂ (b, c, h, w) float32, differentiable in `base_prediction`.

        Args:
            model_input: x_i (b, c, h, w).
            base_prediction: the prediction of the base model for `base_inputs`.
            indices: (b,) the indices of the noise levels.
        """
        z = self.base_inputs(model_input, indices)[0].float()
        alpha = rows(self.objective.alpha, indices, model_input)
        beta = rows(self.objective.beta, indices, model_input)
        cos = rows(self.angles.cos(), indices, model_input)
        sin = rows(self.angles.sin(), indices, model_input)
        kinds = {"epsilon": (0.0, 1.0), "v_prediction": (-sin, cos), "sample": (1.0, 0.0)}
        a, b = kinds[self.kind]
        of_input = (alpha * b - beta * a) * z
        of_prediction = (beta * cos - alpha * sin) * base_prediction.float()
        return (of_input + of_prediction) / (b * cos - a * sin)
