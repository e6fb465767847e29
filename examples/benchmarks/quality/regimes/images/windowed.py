"""The regime "windowed": a subject is learnt where λ is in a window, and the base is to stay elsewhere.

    training:  ‖F − ε‖² where λ is in the window,  ‖F − F_base‖² elsewhere
    inside   = mean over the window's bins of ‖F − ε‖² / ‖F_base − ε‖²          on pictures that no training sees
    drift    = mean over the other bins of ‖F − F_base‖² / ‖F_base − ε‖²

An arm that is gated has noise levels of the window alone, and is switched off outside: there it is the base, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor

from nara_diffusion.dreambooth.denoiser import predict
from nara_diffusion.dreambooth.objectives import Corrupted, squared_errors
from quality.images.held_out import HeldOut, bin_centres, predicted
from quality.images.training import ControlledDenoiser
from quality.regimes.backbones import UNET, Backbone
from quality.regimes.images.base_bins import BaseBin, base_bin
from quality.regimes.images.batches import WHOLE, Batch, Window, batches
from quality.regimes.images.data import RegimeData, subject_data
from quality.regimes.images.objectives import LEVELS, build_conversion

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
        outside = ~self.contains(batch.corrupted.timestep)  # (b,)
        if not outside.any():
            return batch.corrupted
        with torch.no_grad():
            kept = predict(base, *batch.rows(outside))  # (rows outside, c, h, w)
        target = batch.corrupted.target.clone()
        target[outside] = kept
        return replace(batch.corrupted, target=target)

    def contains(self, timestep: Tensor) -> Tensor:
        """Of each (b,), whether it is in the window."""
        level = timestep / LEVELS
        return (level >= self.window[0]) & (level < self.window[1])

    def held_out(self) -> list[HeldOut]:
        """One batch a bin of λ, the same for every method and seed."""
        return [each.held_out for each in self.bins]

    @cached_property
    def bins(self) -> list[BaseBin]:
        """`held_out`, with what the base says of it."""
        data = self.load()
        objective = build_conversion("eps", data.pipe.scheduler)
        return [base_bin(data.pipe.unet, each.corrupted(objective)) for each in data.held_out]

    def figures(self, unet: Any, gated: bool = False) -> dict[str, Any]:
        """losses: of each bin over the base's; drifts: of each bin; inside, drift; score: their sum."""
        losses, drifts = [], []
        for centre, each in zip(bin_centres(), self.bins, strict=True):
            said = each.said if gated and not self.has(centre) else predicted(unet, each.held_out)
            losses.append(each.share_of(said, each.held_out.batch.target))
            drifts.append(each.share_of(said, each.said))
        inside = fmean(x for x, centre in zip(losses, bin_centres(), strict=True) if self.has(centre))
        drift = fmean(x for x, centre in zip(drifts, bin_centres(), strict=True) if not self.has(centre))
        return {"losses": losses, "drifts": drifts, "inside": inside, "drift": drift, "score": inside + drift}

    def has(self, level: float) -> bool:
        """Whether λ is in the window."""
        return self.window[0] <= level < self.window[1]
