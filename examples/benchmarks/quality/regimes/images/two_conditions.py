"""The regime "two conditions": one adapter is to learn one subject where λ is low and another where it is high.

    training:  ‖F − ε‖² on pictures of the first where λ < 0.5 (its texture), of the second elsewhere (its layout)
    score   =  mean over ten bins of ‖F − ε‖² / ‖F_base − ε‖²         on pictures of either that no training sees

Both have the first one's prompt: λ alone says which is meant. Two LoRAs that are switched at λ = 0.5 are the peer
beside the others ("lora_switched").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor

from nara_diffusion.dreambooth.objectives import Corrupted, squared_errors
from quality.images.held_out import HeldOut, bin_centres, predicted
from quality.images.training import ControlledDenoiser
from quality.regimes.backbones import UNET, Backbone
from quality.regimes.images.base_bins import BaseBin, base_bin
from quality.regimes.images.batches import Batch, batches
from quality.regimes.images.data import RegimeData, subject_data
from quality.regimes.images.objectives import LEVELS, build_conversion

SWITCH = 0.5
"""λ below which the first subject is learnt, and from which the second is."""
SECOND = "house"


@dataclass(frozen=True)
class TwoConditions:
    """Attributes:
    first, second: load the pictures of the subject below `SWITCH`, and above it.
    """

    backbone: ClassVar[Backbone] = UNET
    first: Callable[[], RegimeData] = subject_data
    second: Callable[[], RegimeData] = lambda: subject_data(SECOND)

    def loss(self, denoiser: ControlledDenoiser, args: Any, gated: bool = False) -> Callable[[int], Tensor]:
        """The loss of step number n."""
        _refuse_gated(gated)
        below, above = (
            batches(data, build_conversion("eps", data.pipe.scheduler), args) for data in (self.first(), self.second())
        )

        def loss(number: int) -> Tensor:
            batch = joined(below(number), above(number))
            denoiser.shuffled = batch.shuffled
            return squared_errors(denoiser(*batch.inputs), batch.corrupted).mean()

        return loss

    def held_out(self) -> list[HeldOut]:
        """One batch a bin of λ, of the subject that is meant there, with the first one's prompts."""
        return [each.held_out for each in self.bins]

    @cached_property
    def bins(self) -> list[BaseBin]:
        """`held_out`, with what the base says of it."""
        first, second = self.first(), self.second()
        objective = build_conversion("eps", first.pipe.scheduler)
        bins = zip(bin_centres(), first.held_out, second.held_out, strict=True)
        chosen = [a if centre < SWITCH else replace(b, embeddings=a.embeddings) for centre, a, b in bins]
        return [base_bin(first.pipe.unet, each.corrupted(objective)) for each in chosen]

    def figures(self, unet: Any, gated: bool = False) -> dict[str, Any]:
        """losses: of each bin over the base's; score: their mean, by which rates are chosen."""
        _refuse_gated(gated)
        losses = [each.share_of(predicted(unet, each.held_out), each.held_out.batch.target) for each in self.bins]
        return {"losses": losses, "score": fmean(losses)}


def joined(below: Batch, above: Batch) -> Batch:
    """Rows of `below` where λ < `SWITCH`, of `above` elsewhere, with the prompts of `below`; λ and noise are shared."""
    is_below = below.corrupted.timestep < SWITCH * LEVELS  # (b,)

    def chosen(one: Tensor, other: Tensor) -> Tensor:  # (b, …)
        return torch.where(is_below.view(-1, *[1] * (one.ndim - 1)), one, other)

    pairs = {name: (value, getattr(above.corrupted, name)) for name, value in vars(below.corrupted).items()}
    corrupted = Corrupted(**{name: chosen(*pair) for name, pair in pairs.items()})
    return replace(below, corrupted=corrupted, time_ids=chosen(below.time_ids, above.time_ids))


def _refuse_gated(gated: bool) -> None:
    if gated:
        raise ValueError("a gated arm needs a window, which two conditions don't have: choose another --methods.")
