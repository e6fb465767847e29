"""How far a prediction f lies from its target, for each of its elements, e = f − target.

    l2          e²
    huber       2 c (√(e² + c²) − c)      e² where |e| ≪ c,      2 c |e| where |e| ≫ c
    smooth_l1   2 (√(e² + c²) − c)        e² / c where |e| ≪ c,  2 |e| where |e| ≫ c

The last two are pseudo-Huber losses, as kohya's trainers have them with a constant c, and not torch.nn.HuberLoss, which
changes from a parabola to lines at one place. c has the unit of e, which is about 1 for an untrained ε.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

DISTANCES = ("l2", "huber", "smooth_l1")


@dataclass(frozen=True)
class Distance:
    """See the module's docstring.

    Attributes:
        kind: one of `DISTANCES`.
        c: above 0; "l2" has none.
    """

    kind: str = "l2"
    c: float = 0.1

    def __call__(self, differences: Tensor) -> Tensor:
        """Return the distance of each element of e, in any shape."""
        squares = differences**2
        if self.kind == "l2":
            return squares
        # √(e² + c²) − c without the cancellation at small e
        rise = squares / ((squares + self.c**2).sqrt() + self.c)
        return 2 * self.c * rise if self.kind == "huber" else 2 * rise


SQUARED = Distance()
