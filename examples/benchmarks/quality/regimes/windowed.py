"""The regime "windowed": a subject is learnt where λ is in a window, and the base is to stay elsewhere.

    training:  ‖F − ε‖² where λ is in the window,  ‖F − F_base‖² elsewhere
    inside   = mean over the window's bins of ‖F − ε‖² / ‖F_base − ε‖²          on pictures that no training sees
    drift    = mean over the other bins of ‖F − F_base‖² / ‖F_base − ε‖²

An arm that is gated has noise levels of the window alone, and is switched off outside: there it is the base, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor

from nara_diffusion.dreambooth.denoiser import predict
from nara_diffusion.dreambooth.objectives import Corrupted, squared_errors
from quality.images.held_out import HeldOut, bin_centres, held_out_losses
from quality.images.training import ControlledDenoiser
from quality.regimes.backbones import UNET, Backbone
from quality.regimes.batches import WHOLE, Batch, Window, batches
from quality.regimes.data import RegimeData, subject_data
from quality.regimes.objectives import LEVELS, build_conversion

LOW: Window = (0.0, 0.5)
HIGH: Window = (0.5, 1.0)


@dataclass(frozen=True)
class Windowed:
    """Attributes:
    window: where the subject is learnt.
    load: of the pictures.
    """

    backbone: ClassVar[Backbone] = UNET
    window: Window
    load: Callable[[], RegimeData] = subject_data

    def loss(self, denoiser: ControlledDenoiser, args: Any, gated: bool = False) -> Callable[[int], Tensor]:
        """The loss of step number n."""
        data = self.load()
        objective = build_conversion("eps", data.pipe.scheduler)
        batch_of = batches(data, objective, args, self.window if gated else WHOLE)

        def loss(number: int) -> Tensor:
            batch = batch_of(number)
            denoiser.shuffled = batch.shuffled
            return squared_errors(denoiser(*batch.inputs), self.with_base_outside(batch, data.pipe.unet)).mean()

        return loss

    def with_base_outside(self, batch: Batch, base: Any) -> Corrupted:
        """The batch whose targets outside of the window are what `base` says."""
        inside = self.contains(batch.corrupted.timestep)  # (b,)
        if inside.all():
            return batch.corrupted
        with torch.no_grad():
            kept = predict(base, *batch.inputs)  # (b, c, h, w)
        target = torch.where(inside[:, None, None, None], batch.corrupted.target, kept)
        return replace(batch.corrupted, target=target)

    def contains(self, timestep: Tensor) -> Tensor:
        """Of each (b,), whether it is in the window."""
        level = timestep / LEVELS
        return (level >= self.window[0]) & (level < self.window[1])

    def held_out(self) -> list[HeldOut]:
        """One batch a bin of λ, the same for every method and seed."""
        data = self.load()
        objective = build_conversion("eps", data.pipe.scheduler)
        return [each.corrupted(objective) for each in data.held_out]

    def figures(self, unet: Any, gated: bool = False) -> dict[str, Any]:
        """losses: of each bin over the base's; drifts: of each bin; inside, drift; score: their sum."""
        base = self.load().pipe.unet
        losses, drifts = [], []
        for centre, held_out in zip(bin_centres(), self.held_out(), strict=True):
            share, drift = _shares(base if gated and not self.has(centre) else unet, base, held_out)
            losses.append(share)
            drifts.append(drift)
        inside = fmean(x for x, centre in zip(losses, bin_centres(), strict=True) if self.has(centre))
        drift = fmean(x for x, centre in zip(drifts, bin_centres(), strict=True) if not self.has(centre))
        return {"losses": losses, "drifts": drifts, "inside": inside, "drift": drift, "score": inside + drift}

    def has(self, level: float) -> bool:
        """Whether λ is in the window."""
        return self.window[0] <= level < self.window[1]


def _shares(unet: Any, base: Any, held_out: HeldOut) -> tuple[float, float]:
    """The loss of `unet` and its distance from `base`, both over the loss of `base`."""
    before = fmean(held_out_losses(base, held_out))
    kept = replace(held_out, batch=replace(held_out.batch, target=_predicted(base, held_out)))
    return fmean(held_out_losses(unet, held_out)) / before, fmean(held_out_losses(unet, kept)) / before


@torch.no_grad()
def _predicted(unet: Any, held_out: HeldOut) -> Tensor:
    batch = held_out.batch
    return predict(unet, batch.model_input, batch.timestep, held_out.time_ids, held_out.embeddings)
