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
from quality.regimes.images.data import SUBJECT, RegimeData, conversion_data
from quality.regimes.images.objectives import build_conversion
from quality.regimes.images.samples import sampled


@dataclass(frozen=True)
class Conversion:
    """Attributes:
    objective_name: one of `CONVERSIONS`, what the model is converted to.
    load: of the pictures.
    """

    backbone: ClassVar[Backbone] = UNET
    objective_name: str
    load: Callable[[], RegimeData] = conversion_data

    def loss(self, denoiser: ControlledDenoiser, args: Any, gated: bool = False) -> Callable[[int], Tensor]:
        """The loss of step number n."""
        _refuse_gated(gated)
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

    def figures(self, unet: Any, gated: bool = False) -> dict[str, Any]:
        """losses: of each bin; score: their mean, by which rates are chosen."""
        _refuse_gated(gated)
        losses = [fmean(held_out_losses(unet, each)) for each in self.held_out()]
        return {"losses": losses, "score": fmean(losses)}

    def sampled(self, unet: Any, seed: int, trained: bool = True) -> dict[str, float]:
        """alignment and retrieval of samples; those of a base that isn't trained with its own scheduler."""
        objective = self.objective_name if trained else "eps"
        found = sampled(self.load().pipe, unet, objective, SUBJECT, seed)
        return {name: found[name] for name in ("alignment", "retrieval")}


def _refuse_gated(gated: bool) -> None:
    if gated:
        raise ValueError("a gated arm needs a window, which a conversion doesn't have: choose another --methods.")
