"""Corruption by masking: from a noise level λ (b,) to the masked positions (b, l) of the answers.

    t ~ U(ε, 1), one a sequence;   masked_j ~ Bernoulli(t) for every j of the answer;   λ = t

as in LLaDA's supervised fine-tuning (arXiv 2502.09992, algorithm 2). The prompt is never masked. A sequence is laid
out as prompt, answer, padding: `prompt_lengths` (b,) says where the answer starts, `answer_lengths` (b,) or a
right-padded `attention_mask` (b, l) where it ends (at l if neither is given).

Random numbers are a function of (seed, index of the sample in the training stream), nothing else: a sample has the
same λ and the same masks at any number of processes, at any batch size, in any order and at any padding, and a
resumed run needs no random state. Give `seed` and `sample_indices` for that. Without them a seed is drawn from
`generator` (or torch's global one) and the indices are 0 … b − 1, so that processes whose generators agree draw the
same masks.

Stratified λ: of every `group_size` consecutive indices each takes one of the equal-sized strata of (ε, 1),

    t_i = ε + (1 − ε) · ((i + shift) mod n + u_i) / n,   shift ~ U{0 … n − 1} a group,  u_i ~ U(0, 1) a sample

so t_i alone is still uniform, while the mean over the group varies far less. Set `group_size` to the global batch,
with its processes and accumulation steps.

A window of noise levels (`nara_diffusion.noise.window`) takes the place of (ε, 1), as far as it lies within, and, where
the base is held outside, so does the rest of (ε, 1) for a share of the samples.

Complementary masks: every sequence appears twice, with mask m at λ = t and with ¬m at λ = 1 − t, so every
answer token is trained on exactly once a step. There t ~ U(ε, 1 − ε), to keep both weights 1/λ finite. A window then
has to hold 1 − λ with each λ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from nara_diffusion.noise.window import EVERYTHING, NoiseWindow
from nara_diffusion.utils.random import stratified_uniform

MIN_NOISE_LEVEL = 1e-3
"""ε: the smallest λ that training draws."""

_SHIFT_STREAM, _LEVEL_STREAM, _MASK_STREAM = range(3)


@dataclass(frozen=True)
class MaskedBatch:
    """A batch after corruption.

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
    prompt_lengths: torch.Tensor | Sequence[int],
    *,
    mask_token_id: int,
    attention_mask: torch.Tensor | None = None,
    answer_lengths: torch.Tensor | Sequence[int] | None = None,
    noise_level: torch.Tensor | float | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    sample_indices: torch.Tensor | Sequence[int] | None = None,
    stratified: bool = True,
    group_size: int | None = None,
    complementary: bool = False,
    window: NoiseWindow = EVERYTHING,
) -> MaskedBatch:
    """Mask a share λ of every answer; the equations are above.

    Args:
        input_ids: (b, l) clean tokens: prompt, answer, padding on the right.
        prompt_lengths: (b,) tokens before the answer.
        mask_token_id: the token that stands for a masked one.
        attention_mask: (b, l), 1 on prompt and answer, 0 on the padding to their right.
        answer_lengths: (b,), instead of `attention_mask`.
        noise_level: λ in (0, 1], (b,) or one number; drawn if None.
        generator: draws the seed if `seed` is None.
        seed: key of the random numbers, with `sample_indices`.
        sample_indices: (b,) indices of the samples in the training stream.
        stratified: whether drawn λ are stratified over each `group_size` consecutive indices.
        group_size: the number of samples of a stratified group; default: the batch.
        complementary: return 2b rows, the second half with the complementary masks.
        window: the window that λ is drawn from.

    Raises:
        ValueError: lengths that leave a row without an answer or exceed l, padding on the left, λ outside (0, 1],
            indices without a seed, a window without λ (see `check_drawable`).
    """
    b, width = _batch_shape(input_ids)
    device = input_ids.device
    answer = answer_positions(input_ids, prompt_lengths, attention_mask=attention_mask, answer_lengths=answer_lengths)
    if attention_mask is None and answer_lengths is not None:
        attention_mask = (torch.arange(width, device=device) <= _last_position(answer)[:, None]).long()
    seed, indices = _key(seed, sample_indices, generator, b)
    if noise_level is None:
        options = {"stratified": stratified, "group_size": group_size or b, "symmetric": complementary}
        noise_level = draw_noise_levels(indices, seed=seed, window=window, **options).to(device)
    else:
        noise_level = _checked_noise_level(noise_level, b, device, below_one=complementary)
    masked = draw_masks(answer, noise_level, indices, seed=seed)  # (b, l)
    targets = input_ids
    if complementary:
        masked = torch.cat([masked, answer & ~masked])  # (2b, l)
        noise_level = torch.cat([noise_level, 1 - noise_level])  # (2b,)
        targets, answer = targets.repeat(2, 1), answer.repeat(2, 1)
        attention_mask = None if attention_mask is None else attention_mask.repeat(2, 1)
    return MaskedBatch(
        input_ids=targets.masked_fill(masked, mask_token_id),
        targets=targets,
        masked=masked,
        answer=answer,
        noise_level=noise_level,
        attention_mask=attention_mask,
    )


def answer_positions(
    input_ids: torch.Tensor,
    prompt_lengths: torch.Tensor | Sequence[int],
    *,
    attention_mask: torch.Tensor | None = None,
    answer_lengths: torch.Tensor | Sequence[int] | None = None,
) -> torch.Tensor:
    """The positions of the answers: (b, l) bool.

    Raises:
        ValueError: wrong shapes, padding on the left, an answer that is empty or longer than the row.
    """
    b, width = _batch_shape(input_ids)
    device = input_ids.device
    starts = _lengths("prompt_lengths", prompt_lengths, b, device)
    ends = torch.full((b,), width, device=device)
    if attention_mask is not None:
        ends = _unpadded_lengths(attention_mask, b, width)
    if answer_lengths is not None:
        stated = starts + _lengths("answer_lengths", answer_lengths, b, device)
        if attention_mask is not None and not torch.equal(stated, ends):
            raise ValueError(
                f"prompt_lengths + answer_lengths is {stated.tolist()}, attention_mask counts {ends.tolist()}: "
                "pass one of the two"
            )
        ends = stated
    bad = (starts < 0) | (ends <= starts) | (ends > width)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"row {row} of the batch: its answer would take positions {int(starts[row])} to {int(ends[row])} of "
            f"{width}; an answer needs one token at least, and has to end within its row"
        )
    positions = torch.arange(width, device=device)
    return (positions >= starts[:, None]) & (positions < ends[:, None])


def _batch_shape(input_ids: torch.Tensor) -> tuple[int, int]:
    """(b, l); raises ValueError for another number of dimensions."""
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected (b, l): one row a sample")
    return input_ids.shape[0], input_ids.shape[1]


def draw_noise_levels(
    sample_indices: Sequence[int],
    *,
    seed: int,
    stratified: bool = True,
    group_size: int = 1,
    symmetric: bool = False,
    window: NoiseWindow = EVERYTHING,
) -> torch.Tensor:
    """λ for each index of the training stream: (b,) float32 in (ε, 1), or in (ε, 1 − ε) if `symmetric`; in `window`.

    The same index gets the same λ in any process and in any batch; the module's docstring has the formula.
    """
    u = stratified_uniform(
        sample_indices,
        group_size if stratified else 1,
        shift=partial(_random, seed, _SHIFT_STREAM),
        value=partial(_random, seed, _LEVEL_STREAM),
    )
    check_drawable(window, symmetric)
    top = 1 - MIN_NOISE_LEVEL if symmetric else 1.0
    low, high = max(window.low, MIN_NOISE_LEVEL), min(window.high, top)
    below, above = low - MIN_NOISE_LEVEL, top - high  # lengths of the two parts outside
    v, is_outside = window.divide(u, (below + above) / (top - MIN_NOISE_LEVEL))
    place = MIN_NOISE_LEVEL + (below + above) * v
    outside = torch.where(place < low, place, place + (high - low))
    inside = (low + (high - low) * v).float()
    if high < top:  # rounded, it would lie on the window's edge, which is outside
        inside = inside.clamp(max=float(np.nextafter(np.float32(high), np.float32(0))))
    return torch.where(is_outside, outside.float(), inside)


def check_drawable(window: NoiseWindow, complementary: bool = False) -> None:
    """Refuse a window that no λ is drawn in, or, where the base is held, outside of; and, for complementary masks, one
    that doesn't hold 1 − λ with each λ.

    Raises:
        ValueError: naming the window and what to change.
    """
    top = 1 - MIN_NOISE_LEVEL if complementary else 1.0
    given = f"min_noise_level is {window.low} and max_noise_level {window.high}"
    drawn = f"masked shares are drawn from {MIN_NOISE_LEVEL} to {top:g}"
    if window.low >= top or window.high <= MIN_NOISE_LEVEL:
        raise ValueError(f"{given}, but {drawn}, and none lies between: widen the window.")
    if window.hold_weight is not None and window.low <= MIN_NOISE_LEVEL and window.high >= top:
        raise ValueError(
            f"{given}, but {drawn}, and none lies outside of them for hold_base_outside: leave it out, or narrow the "
            "window."
        )
    if complementary and abs(window.low + window.high - 1) > 1e-9:
        low = min(window.low, 1 - window.high)
        raise ValueError(
            f"{given}, but complementary masks have a λ of 1 − λ beside each λ, which this window doesn't hold: leave "
            f"complementary out, or take a window that is the same from both ends, as from {low:g} to {1 - low:g}."
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
        uniform[row, columns] = _random(seed, _MASK_STREAM, sample_indices[row]).random(int(columns.sum()))
    chosen = torch.from_numpy(uniform) < noise_level.cpu().double()[:, None]  # (b, l)
    return answer & chosen.to(answer.device)


def _random(seed: int, stream: int, number: int) -> np.random.Generator:
    return np.random.default_rng((seed, stream, number))


def _key(
    seed: int | None, sample_indices: torch.Tensor | Sequence[int] | None, generator: torch.Generator | None, b: int
) -> tuple[int, list[int]]:
    """The seed and the indices of the b samples, from which all random numbers are drawn."""
    if seed is None:
        if sample_indices is not None:
            raise ValueError("sample_indices were given without a seed: pass seed=, or leave both out")
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=device))
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected 0 or more")
    indices = list(range(b)) if sample_indices is None else [int(i) for i in sample_indices]
    if len(indices) != b or min(indices) < 0:
        raise ValueError(f"sample_indices is {indices}, the batch is {b}: pass one index >= 0 a sample")
    return seed, indices


def _lengths(name: str, lengths: torch.Tensor | Sequence[int], b: int, device: torch.device) -> torch.Tensor:
    lengths = torch.as_tensor(lengths, device=device)
    if lengths.shape != (b,) or lengths.is_floating_point():
        raise ValueError(
            f"{name} has shape {tuple(lengths.shape)} and {lengths.dtype}, expected {b} integers, one a row"
        )
    return lengths


def _unpadded_lengths(attention_mask: torch.Tensor, b: int, width: int) -> torch.Tensor:
    if attention_mask.shape != (b, width):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {(b, width)}: they have to agree"
        )
    real = attention_mask.bool()
    if (real[:, 1:] & ~real[:, :-1]).any() or not real[:, 0].all():
        raise ValueError("attention_mask has padding on the left or within a row: pad sequences on the right")
    return real.sum(1)


def _last_position(answer: torch.Tensor) -> torch.Tensor:
    return answer.shape[1] - 1 - answer.flip(1).int().argmax(1)


def _checked_noise_level(
    noise_level: torch.Tensor | float, b: int, device: torch.device, *, below_one: bool
) -> torch.Tensor:
    levels = torch.as_tensor(noise_level, dtype=torch.float32, device=device)
    if levels.ndim > 1 or (levels.ndim == 1 and levels.shape[0] != b):
        raise ValueError(
            f"noise_level has shape {tuple(levels.shape)}, the batch is {b}: pass one value, or one a sample"
        )
    levels = levels.expand(b)
    if not ((levels > 0) & (levels <= 1)).all() or (below_one and (levels == 1).any()):
        interval = "(0, 1), since the complementary masks get 1 - noise_level" if below_one else "(0, 1]"
        raise ValueError(f"noise_level is {levels.tolist()}, expected values in {interval}: at 0 nothing is masked")
    return levels
