"""The regime "one image": a subject is learnt from one picture by many steps, as T-LoRA has it (arXiv 2507.05964).

Every 40 steps the model draws the subject in ten places:
    similarity = mean cosine of a sample and the subject's five pictures        (subject fidelity)
    alignment  = mean cosine of a sample and its prompt                         (prompt fidelity)
    score      = 1 − the best alignment of a look whose similarity is s or more, mean over s in `LEVELS_OF_SIMILARITY`

Training trades one for the other, each method at its own pace, so that they are compared where the subject is equally
like, by the checkpoint that a user would keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

from torch import Tensor

from nara_diffusion.dreambooth.arguments.loss import bias_of
from nara_diffusion.dreambooth.loss import windowed_schedule
from nara_diffusion.dreambooth.objectives import squared_errors
from nara_diffusion.noise.window import NoiseWindow
from quality.images.held_out import HeldOut
from quality.images.training import ControlledDenoiser
from quality.regimes.backbones import UNET, Backbone
from quality.regimes.images.batches import batches
from quality.regimes.images.conversion import Conversion
from quality.regimes.images.data import SUBJECT, RegimeData, one_picture
from quality.regimes.images.objectives import build_conversion
from quality.regimes.images.samples import sampled

EVERY = 40
LEVELS_OF_SIMILARITY = (0.44, 0.47, 0.5)
Look = dict[str, float]
"""step, similarity, alignment."""


@dataclass(frozen=True)
class OneImage:
    """Attributes:
    load: of the picture.
    every: steps between two looks.
    """

    backbone: ClassVar[Backbone] = UNET
    load: Callable[[], RegimeData] = one_picture
    every: int = EVERY

    def loss(self, denoiser: ControlledDenoiser, args: Any, gated: bool = False) -> Callable[[int], Tensor]:
        """The loss of step number n; --timestep_bias_strategy of `args` says which noise levels are drawn how often."""
        if gated:
            raise ValueError("a gated arm needs a window, which one image doesn't have: choose another --methods.")
        data = self.load()
        objective = build_conversion("eps", data.pipe.scheduler)
        schedule = windowed_schedule(objective, NoiseWindow(), bias_of(args))
        batch_of = batches(data, objective, args, schedule=schedule)

        def loss(number: int) -> Tensor:
            batch = batch_of(number)
            denoiser.shuffled = batch.shuffled
            return squared_errors(denoiser(*batch.inputs), batch.corrupted).mean()

        return loss

    def held_out(self) -> list[HeldOut]:
        """One batch a bin of λ, of other pictures of the subject."""
        return self._plain.held_out()

    def figures(self, unet: Any, gated: bool = False) -> dict[str, Any]:
        """losses: of each bin of λ, on held-out pictures of the subject."""
        return {"losses": self._plain.figures(unet, gated)["losses"]}

    @property
    def _plain(self) -> Conversion:
        """What the base predicts, of these pictures."""
        return Conversion("eps", self.load)

    def look(self, unet: Any, seed: int) -> Look:
        """similarity and alignment of what `unet` draws now, from noise that follows from the seed."""
        found = sampled(self.load().pipe, unet, "eps", SUBJECT, seed)
        return {name: found[name] for name in ("similarity", "alignment")}


def score_of(looks: Sequence[Look], levels: Sequence[float] = LEVELS_OF_SIMILARITY) -> float | None:
    """1 − alignment at equal similarity, mean over its `levels`; None if one of them isn't reached."""
    found = [alignment_at(level, looks) for level in levels]
    return None if None in found else 1 - fmean(each for each in found if each is not None)


def alignment_at(level: float, looks: Sequence[Look]) -> float | None:
    """The best alignment of a look whose similarity is `level` or more; None if there is none."""
    return max((look["alignment"] for look in looks if look["similarity"] >= level), default=None)
