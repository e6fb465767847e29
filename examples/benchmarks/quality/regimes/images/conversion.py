"""The regime "conversion": an ε-model learns to predict something else, from many pictures of one kind.

loss = mean over ten bins of λ of ‖F(x_λ, λ) − target‖² / d          on pictures that no training sees
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

from torch import Tensor

from nara_diffusion.dreambooth.objectives import squared_errors
from quality.images.held_out import HeldOut, held_out_losses
from quality.images.training import ControlledDenoiser
from quality.regimes.backbones import UNET, Backbone
from quality.regimes.images.batches import batches
from quality.regimes.images.data import RegimeData, conversion_data
from quality.regimes.images.objectives import build_conversion


@dataclass(frozen=True)
class Conversion:
    """Attributes:
    objective_name: one of `CONVERSIONS`, what the model is converted to.
    load: of the pictures.
    """

    backbone: ClassVar[Backbone] = UNET
    objective_name: str
    load: Callable[[], RegimeData] = conversion_data

    def loss(self, denoiser: ControlledDenoiser, args: Any) -> Callable[[int], Tensor]:
        """The loss of step number n."""
        data = self.load()
        batch_of = batches(data, build_conversion(self.objective_name, data.pipe.scheduler), args)

        def loss(number: int) -> Tensor:
            batch = batch_of(number)
            denoiser.shuffled = batch.shuffled
            return squared_errors(denoiser(*batch.inputs), batch.corrupted).mean()

        return loss

    def held_out(self) -> list[HeldOut]:
        """One batch a bin of λ, the same for every method and seed."""
        data = self.load()
        objective = build_conversion(self.objective_name, data.pipe.scheduler)
        return [each.corrupted(objective) for each in data.held_out]

    def figures(self, unet: Any) -> dict[str, Any]:
        """losses: of each bin; score: their mean, by which rates are chosen."""
        losses = [fmean(held_out_losses(unet, each)) for each in self.held_out()]
        return {"losses": losses, "score": fmean(losses)}
