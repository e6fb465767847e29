"""What is known of a class of denoisers: how its pipelines tell it the noise, and how its layers see the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..timesteps import TimestepNoise, UndeclaredTimestep


@dataclass(frozen=True)
class Denoiser:
    """The entry of a class of denoisers: how its forwards tell λ.

    Attributes:
        meaning, argument, scale, also, packed, pinned: see `TimestepNoise`.
        sample_major: whether layers may see b · k rows, k consecutive ones a sample (frames, positions, tokens),
            where the model sees b. Otherwise another number of rows than the batch's is an error.
        one_level: whether the first axis that layers see is not the samples': a batch of unequal λ is refused.
    """

    meaning: str = "discrete"
    argument: str = "timestep"
    sample_major: bool = False
    scale: float = 1.0
    also: tuple[str, ...] = ()
    packed: bool = False
    one_level: bool = False
    pinned: tuple[str, Any, float] | None = None

    def source(self, convention: str | None = None) -> TimestepNoise:
        """The source that reads λ from its timestep, for adapters with this `convention` (None: that of the class).

        Models of discrete schedules are trained in EDM's terms too, or converted to a rectified flow: an adapter that
        says so is read so.
        """
        meaning = self.meaning
        if meaning == "discrete":
            meaning = {"edm": "edm", "flow": "sigma_1000"}.get(convention or "", meaning)
        return UndeclaredTimestep(
            meaning,
            argument=self.argument,
            scale=self.scale,
            also=self.also,
            packed=self.packed,
            pinned=self.pinned,
        )
