"""What the base says of a bin of held-out pictures, computed once: every run of a regime is measured against it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from torch import Tensor

from nara_diffusion.dreambooth.objectives import squared_errors
from quality.images.held_out import HeldOut, predicted


@dataclass(frozen=True)
class BaseBin:
    """Attributes:
    held_out: the pictures, with their noise.
    said: by the base, (b, c, h, w).
    loss: the base's.
    """

    held_out: HeldOut
    said: Tensor
    loss: float

    def share_of(self, said: Tensor, target: Tensor) -> float:
        """The mean squared distance of `said` from `target`, both (b, c, h, w), over the loss of the base."""
        return _mean_error(said, self.held_out, target) / self.loss


def base_bin(base: Any, held_out: HeldOut) -> BaseBin:
    """The bin `held_out`, with what the model `base` says of it."""
    said = predicted(base, held_out)
    return BaseBin(held_out, said, _mean_error(said, held_out, held_out.batch.target))


def _mean_error(said: Tensor, held_out: HeldOut, target: Tensor) -> float:
    return fmean(squared_errors(said, replace(held_out.batch, target=target)).tolist())
