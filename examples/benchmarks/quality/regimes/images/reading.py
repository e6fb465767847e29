"""A conversion whose model keeps predicting ε: the identity reads what it says as what the regime asks for.

    loss = mean over ten bins of λ of ‖reading(F(x, t)) − target‖² / d        the held-out pictures of the conversion

x and t are what the base is shown at the level of x_λ (nara_diffusion's `IdentityReading`). F is the base, or the base
with an adapter that was trained by the same loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from torch import Tensor

from nara_diffusion.dreambooth.conversion import IdentityReading
from nara_diffusion.dreambooth.objectives import Corrupted, Objective, squared_errors
from quality.images.held_out import predicted
from quality.images.training import ControlledDenoiser
from quality.regimes.images.batches import batches
from quality.regimes.images.conversion import Conversion
from quality.regimes.images.objectives import build_conversion


class Noting:
    """An objective that keeps the indices of its last batch, which the reading needs beside it."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.levels = objective, objective.levels

    def corrupt(self, clean: Tensor, noise: Tensor, indices: Tensor) -> Corrupted:
        self.indices = indices
        return self.objective.corrupt(clean, noise, indices)


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
        noting = Noting(objective)
        batch_of = batches(self.load(), noting, args)  # type: ignore[arg-type]

        def loss(number: int) -> Tensor:
            batch = batch_of(number)
            shown, indices = batch.corrupted.model_input, noting.indices
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
