"""Masking: from a noise level λ (b,) to the masked positions (b, l) of the answers.

    t ~ U(ε, 1), one a sequence;   masked_j ~ Bernoulli(t) for every j of the answer;   λ = t

as in LLaDA's supervised fine-tuning (arXiv 2502.09992, algorithm 2). The prompt is never masked. A sequence is laid
out as prompt, answer, padding: `prompt_lengths` (b,) says where the answer starts, `answer_lengths` (b,) where it ends
(at l if they aren't given).

Random numbers are a function of (seed, index of the sample in the training stream), nothing else: a sample has the
same λ and the same masks at any number of processes, at any batch size, in any order and at any padding, and a
resumed run needs no random state. Give `seed` and `sample_indices` for that. Without them a seed is drawn from
`generator` (or torch's global one) and the indices are 0 … b − 1.

Stratified λ: of every `group_size` consecutive indices each takes one of the equal strata of (ε, 1), see
`nara_diffusion.utils.random`. A window of noise levels takes the place of (ε, 1), as far as it lies within.

Complementary masks: every sequence appears twice, with mask m at λ = t and with ¬m at λ = 1 − t, so that every answer
token is trained on exactly once a step. There t ~ U(ε, 1 − ε), to keep both weights 1/λ finite. A window then has to
hold 1 − λ with each λ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from nara_diffusion.noise.strength_schedule import EVERYTHING, NoiseWindow
from nara_diffusion.utils.random import stratified_uniform

MIN_NOISE_LEVEL = 1e-3
"""ε: the smallest λ that training draws."""

_SHIFT_STREAM, _LEVEL_STREAM, _MASK_STREAM = range(3)

Lengths = torch.Tensor | Sequence[int]


@dataclass(frozen=True)
class MaskedBatch:
    """A batch after masking.

    Attributes:
        input_ids: (b, l) with the mask token at masked positions; what the model sees.
        targets: (b, l) the clean tokens.
        masked: (b, l) bool.
        answer: (b, l) bool, the positions that could have been masked.
        noise_level: (b,) float32, λ.
        attention_mask: (b, l) int64, 1 on prompt and answer, or None where nothing is padded.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    masked: torch.Tensor
    answer: torch.Tensor
    noise_level: torch.Tensor
    attention_mask: torch.Tensor | None


def mask_answers(
    input_ids: torch.Tensor,
    prompt_lengths: Lengths,
    *,
    mask_token_id: int,
    answer_lengths: Lengths | None = None,
    noise_level: torch.Tensor | float | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    sample_indices: Lengths | None = None,
    group_size: int | None = None,
    complementary: bool = False,
    window: NoiseWindow = EVERYTHING,
) -> MaskedBatch:
    """Mask a share λ of every answer; the equations are above.

    Args:
        input_ids: (b, l) clean tokens: prompt, answer, padding on the right.
        prompt_lengths: (b,) tokens before the answer.
        mask_token_id: the token that stands for a masked one.
        answer_lengths: (b,) tokens of each answer; without them, answers end at l.
        noise_level: λ in (0, 1], (b,) or one number; drawn if None.
        generator: draws the seed if `seed` is None.
        seed: key of the random numbers, with `sample_indices`.
        sample_indices: (b,) indices of the samples in the training stream.
        group_size: the number of consecutive samples over which drawn λ are stratified; default: the batch; 1 draws
            them independently.
        complementary: return 2b rows, the second half with the complementary masks.
        window: the window that λ is drawn from.

    Raises:
        ValueError: lengths that leave a row without an answer or exceed l, λ outside (0, 1], indices without a seed, a
            window without λ (see `check_drawable`).
    """
    b, device = len(input_ids), input_ids.device
    answer, attention_mask = (
        answer_positions(input_ids, prompt_lengths, answer_lengths=answer_lengths),
        None,
    )
    if answer_lengths is not None:
        attention_mask = (
            answer.flip(1).cumsum(1).flip(1) > 0
        ).long()  # up to the end of the answer
    seed, indices = _key(seed, sample_indices, generator, b)
    if noise_level is None:
        options: dict[str, Any] = {
            "group_size": group_size or b,
            "symmetric": complementary,
            "window": window,
        }
        levels = draw_noise_levels(indices, seed=seed, **options).to(device)
    else:
        levels = torch.as_tensor(noise_level, dtype=torch.float32, device=device).expand(b)
        if not ((levels > 0) & (levels <= 1)).all() or (complementary and (levels == 1).any()):
            interval = (
                "(0, 1), since the complementary masks get 1 - noise_level"
                if complementary
                else "(0, 1]"
            )
            raise ValueError(
                f"noise_level is {levels.tolist()}, expected values in {interval}: at 0 nothing is masked"
            )
    masked = draw_masks(answer, levels, indices, seed=seed)  # (b, l)
    targets = input_ids
    if complementary:
        masked = torch.cat([masked, answer & ~masked])  # (2b, l)
        levels = torch.cat([levels, 1 - levels])  # (2b,)
        targets, answer = targets.repeat(2, 1), answer.repeat(2, 1)
        attention_mask = None if attention_mask is None else attention_mask.repeat(2, 1)
    return MaskedBatch(
        targets.masked_fill(masked, mask_token_id), targets, masked, answer, levels, attention_mask
    )


def with_level_token(batch: MaskedBatch, digits: Sequence[int]) -> MaskedBatch:
    """`batch` with a token that says λ at the end of each prompt, so that rows are one token longer.

    Args:
        digits: ten ids, of which a row gets number ⌊10 λ⌋.
    """
    b, length = batch.input_ids.shape
    place = (batch.answer.cumsum(1) == 0).sum(1, keepdim=True)  # (b, 1)
    places = torch.arange(length + 1, device=place.device).expand(b, -1)  # (b, l + 1)
    source = (places - (places > place).long()).clamp(max=length - 1)
    names = ("input_ids", "targets", "masked", "answer", "attention_mask")
    parts = {
        name: part.gather(1, source) for name in names if (part := getattr(batch, name)) is not None
    }
    level = torch.tensor(digits, device=place.device)[(10 * batch.noise_level).long().clamp(max=9)][
        :, None
    ]  # (b, 1)
    parts |= {name: parts[name].scatter(1, place, level) for name in ("input_ids", "targets")}
    parts |= {name: parts[name].scatter(1, place, False) for name in ("masked", "answer")}
    return replace(batch, **parts)


def answer_positions(
    input_ids: torch.Tensor,
    prompt_lengths: Lengths,
    *,
    answer_lengths: Lengths | None = None,
) -> torch.Tensor:
    """The positions of the answers: (b, l) bool.

    Raises:
        ValueError: lengths that are not one whole number a row; an answer that is empty or longer than the row.
    """
    width = input_ids.shape[1]
    positions = torch.arange(width, device=input_ids.device)
    starts = _lengths("prompt_lengths", prompt_lengths, input_ids)
    ends = torch.full_like(starts, width)
    if answer_lengths is not None:
        ends = starts + _lengths("answer_lengths", answer_lengths, input_ids)
    bad = (starts < 0) | (ends <= starts) | (ends > width)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"row {row} of the batch: its answer would take positions {int(starts[row])} to {int(ends[row])} of "
            f"{width}; an answer needs one token at least, and has to end within its row"
        )
    return (positions >= starts[:, None]) & (positions < ends[:, None])


def _lengths(name: str, lengths: Lengths, input_ids: torch.Tensor) -> torch.Tensor:
    found = torch.as_tensor(lengths, device=input_ids.device)
    if found.is_floating_point() or found.shape != (len(input_ids),):
        raise ValueError(
            f"{name} is {lengths!r}: pass a whole number for each of the {len(input_ids)} rows"
        )
    return found


def draw_noise_levels(
    sample_indices: Sequence[int],
    *,
    seed: int,
    group_size: int = 1,
    symmetric: bool = False,
    window: NoiseWindow = EVERYTHING,
) -> torch.Tensor:
    """λ for each index of the training stream: (b,) float32 in (ε, 1), or in (ε, 1 − ε) if `symmetric`; in `window`.

    The same index gets the same λ in any process and in any batch.
    """
    u = stratified_uniform(
        sample_indices,
        group_size,
        shift=partial(_random, seed, _SHIFT_STREAM),
        value=partial(_random, seed, _LEVEL_STREAM),
    )
    check_drawable(window, symmetric)
    top = 1 - MIN_NOISE_LEVEL if symmetric else 1.0
    low, high = max(window.low, MIN_NOISE_LEVEL), min(window.high, top)
    levels = (low + (high - low) * u).float()
    if high < top:  # rounded, it would lie on the window's edge, which is outside
        levels = levels.clamp(max=float(np.nextafter(np.float32(high), np.float32(0))))
    return levels


def check_drawable(window: NoiseWindow, complementary: bool = False) -> None:
    """Refuse a window that no λ is drawn in; and, for complementary masks, one that lacks 1 − λ of a λ.

    Raises:
        ValueError: naming the window and what to change.
    """
    top = 1 - MIN_NOISE_LEVEL if complementary else 1.0
    given = f"min_noise_level is {window.low} and max_noise_level {window.high}"
    if window.low >= top or window.high <= MIN_NOISE_LEVEL:
        raise ValueError(
            f"{given}, and masked shares are drawn from {MIN_NOISE_LEVEL} to {top:g}: widen the window."
        )
    if complementary and abs(window.low + window.high - 1) > 1e-9:
        low = min(window.low, 1 - window.high)
        raise ValueError(
            f"{given}, and complementary masks need 1 − λ beside each λ: leave complementary out, or take a window "
            f"that is the same from both ends, as from {low:g} to {1 - low:g}."
        )


def draw_masks(
    answer: torch.Tensor, noise_level: torch.Tensor, sample_indices: Sequence[int], *, seed: int
) -> torch.Tensor:
    """Bernoulli(λ) over the answers: (b, l) bool.

    The j-th token of an answer always meets the same random number, so the masks of one (seed, index) grow with λ:
    losses at two λ are compared on nested masks.
    """
    uniform = np.ones(answer.shape)
    for row, columns in enumerate(answer.cpu().numpy()):
        uniform[row, columns] = _random(seed, _MASK_STREAM, sample_indices[row]).random(
            int(columns.sum())
        )
    chosen = torch.from_numpy(uniform) < noise_level.cpu().double()[:, None]  # (b, l)
    return answer & chosen.to(answer.device)


def _random(seed: int, stream: int, number: int) -> np.random.Generator:
    return np.random.default_rng((seed, stream, number))


def _key(
    seed: int | None, sample_indices: Lengths | None, generator: torch.Generator | None, b: int
) -> tuple[int, list[int]]:
    """The seed and the indices of the b samples, from which all random numbers are drawn."""
    if seed is None:
        if sample_indices is not None:
            raise ValueError(
                "sample_indices were given without a seed: pass seed=, or leave both out"
            )
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=device))
    indices = list(range(b)) if sample_indices is None else [int(i) for i in sample_indices]
    if len(indices) != b:
        raise ValueError(f"sample_indices is {indices}, the batch is {b}: pass one index a sample")
    return seed, indices
