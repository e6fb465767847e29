"""Bayes' rule on the open answers of blind text: the best that a reader can say, of any model.

A character x of an answer is one of K = 36, all alike, and is replaced, with probability λ, by one of the n = 39 tokens
of the noise, the true one among them. Of the token z that is seen there, a reader who is told λ knows

    p(x | z, λ) = ((1 − λ) [x = z] + λ / n) / (1 − λ + K λ / n)    if z is one of the K characters
                = 1 / K                                            if not: it was replaced then

and nothing else, since neither the prompt nor the rest of the answer says anything of x. The end of the answer is
always in the same place, so that p = 1 there. A reader who isn't told λ knows what the whole answer shows of it:

    p(x | z₁ … z_m) = Σ_λ p(x | z, λ) Π_i p(z_i | λ) / Σ_λ Π_i p(z_i | λ)            over a grid of λ, all alike before

with p(z | λ) = (1 − λ) / K + λ / n of a character, λ / n of another token, and 1 − λ + λ / n of an end that is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nara_diffusion.dllm.masking import MaskedBatch
from quality.regimes.text.corruption import REPLACED, noise_tokens, token_ids
from quality.regimes.text.data import CHARACTERS
from quality.text.runs import load

LEVELS = 200
"""Of the grid of λ of a reader who isn't told it."""


def bayes_losses(batch: MaskedBatch, is_told: bool = True) -> Tensor:
    """− log p (b, l) of the clean tokens."""
    if is_told:
        p = _character(batch, batch.noise_level.double()[:, None])
    else:
        levels = (torch.arange(LEVELS, dtype=torch.double) + 0.5) / LEVELS
        weights = torch.stack([_evidence(batch, level).sum(1) for level in levels]).softmax(0)  # (LEVELS, b)
        of_levels = [weight[:, None] * _character(batch, level) for weight, level in zip(weights, levels, strict=True)]
        p = torch.stack(of_levels).sum(0)
    return -p.log() * torch.isin(batch.targets, token_ids(CHARACTERS))


def _character(batch: MaskedBatch, level: Tensor) -> Tensor:
    """p(x | z, λ) (b, l) of the clean character x, where there is one."""
    characters, noise = token_ids(CHARACTERS), len(noise_tokens(load(REPLACED.backbone)[1]))
    same, is_character = batch.input_ids == batch.targets, torch.isin(batch.input_ids, characters)  # (b, l)
    p = ((1 - level) * same + level / noise) / (1 - level + len(characters) * level / noise)
    return torch.where(is_character, p, 1 / len(characters))


def _evidence(batch: MaskedBatch, level: Tensor) -> Tensor:
    """log p(z | λ) (b, l) of the answer's tokens, 0 elsewhere."""
    characters, noise = token_ids(CHARACTERS), len(noise_tokens(load(REPLACED.backbone)[1]))
    is_character = torch.isin(batch.input_ids, characters)
    of_character = level / noise + (1 - level) / len(characters) * is_character
    of_end = level / noise + (1 - level) * (batch.input_ids == batch.targets)
    return torch.where(torch.isin(batch.targets, characters), of_character, of_end).log() * batch.answer
