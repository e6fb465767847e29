"""Bayes' rule on random characters: the best that a reader of a canvas can say of them, told λ or not.

Each of K characters x is as likely as the others, and a place is replaced, with probability λ, by one of the V tokens
of a vocabulary that has them all. Of the token z that is seen there, a reader who is told λ knows

    p(x | z, λ) = ((1 − λ) [x = z] + λ / V) / (1 − λ + K λ / V)    if z is one of the K characters
                = 1 / K                                            if not: it was replaced then

A reader who isn't told λ weighs a grid of λ with what the whole canvas shows of it:

    p(x | z₁ … z_c) = Σ_λ p(x | z, λ) Π_i p(z_i | λ) / Σ_λ Π_i p(z_i | λ)            p(λ) uniform
    p(z | λ) = (1 − λ) [z is a character] / K + λ / V         where the clean token is open
             = (1 − λ) [z is the clean token] + λ / V         where it is always the same, as behind an answer's end
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 200
"""Of the grid of λ of a reader who isn't told it."""
CANVASES = ((16, 36, 284), (64, 36, 284), (256, 36, 284), (16, 36, 36), (256, 36, 36), (256, 36, 262144))
"""(positions, characters, vocabulary) of the table."""


@dataclass(frozen=True)
class Seen:
    """What a reader sees of b canvases of c places.

    Attributes:
        known: (b, c) bool, places that show one of the characters.
        same: (b, c) bool, places that show their clean token.
        is_open: (b, c) bool, places whose clean token is a random character; they alone count.
        level: (b,) λ.
        characters, vocabulary: K and V.
    """

    known: Tensor
    same: Tensor
    is_open: Tensor
    level: Tensor
    characters: int
    vocabulary: int


def bayes_losses(seen: Seen, is_told: bool = True) -> Tensor:
    """− log p (b, c) of the clean tokens."""
    if is_told:
        p = _character(seen, seen.level.double()[:, None])
    else:
        levels = (torch.arange(LEVELS, dtype=torch.double)[:, None] + 0.5) / LEVELS  # axes keep them float64
        weights = torch.stack([_evidence(seen, level) for level in levels]).softmax(0)  # (LEVELS, b)
        of_levels = [weight[:, None] * _character(seen, level) for weight, level in zip(weights, levels, strict=True)]
        p = torch.stack(of_levels).sum(0)
    return -p.log() * seen.is_open


def _character(seen: Seen, level: Tensor) -> Tensor:
    """p(x | z, λ) (b, c) of the clean character."""
    k, v = seen.characters, seen.vocabulary
    p = ((1 - level) * seen.same + level / v) / (1 - level + k * level / v)
    return torch.where(seen.known, p, 1 / k)


def _evidence(seen: Seen, level: Tensor) -> Tensor:
    """log p(z₁ … z_c | λ) (b,)."""
    unchanged = torch.where(seen.is_open, seen.known / seen.characters, seen.same.float())
    return ((1 - level) * unchanged + level / seen.vocabulary).log().sum(1)


def open_canvases(canvas: int, characters: int, vocabulary: int, count: int = 1000) -> Seen:
    """Canvases full of random characters, the first K of the vocabulary, at λ that are spread evenly."""
    generator = torch.Generator().manual_seed(0)
    level = (torch.arange(count, dtype=torch.double) + 0.5) / count
    clean = torch.randint(characters, (count, canvas), generator=generator)
    noise = torch.randint(vocabulary, (count, canvas), generator=generator)
    changed = torch.rand(count, canvas, generator=generator) < level[:, None]
    canvases = torch.where(changed, noise, clean)
    everywhere = torch.ones_like(changed)
    return Seen(canvases < characters, canvases == clean, everywhere, level, characters, vocabulary)
