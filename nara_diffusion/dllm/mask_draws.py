"""Draw λ and masks on the CPU, from random numbers that depend only on (seed, index of the sample)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from nara_diffusion.noise.level import EVERYTHING, NoiseWindow, stratified_uniform

from .answer_places import Lengths, host_list

MIN_NOISE_LEVEL = 1e-3
"""ε: the smallest λ that training draws."""
_NEXT_BLOCK = (5**0.5 - 1) / 2
"""The step of λ from block to block, as a part of its range. Multiples of the golden ratio are
spread evenly over it, however many they are."""
_SHIFT_STREAM, _LEVEL_STREAM, _MASK_STREAM, BLOCK_STREAM = range(4)


def noise_levels(
    noise_level: torch.Tensor | float | None,
    sample_indices: Sequence[int],
    seed: int,
    group_size: int | None,
    *,
    symmetric: bool = False,
    window: NoiseWindow = EVERYTHING,
    blocks: np.ndarray | None = None,
) -> np.ndarray:
    """Return `noise_level` as (b,) float32, or draw λ if it is None.

    The arguments are those of `draw_noise_levels`; by default, a group is the batch.

    Raises:
        ValueError: λ or its complement masks nothing, or there are neither 1 nor b values.
    """
    b = len(sample_indices)
    if noise_level is None:
        return draw_noise_levels(
            sample_indices,
            seed,
            group_size or b,
            symmetric=symmetric,
            window=window,
            blocks=blocks,
        )
    is_tensor = isinstance(noise_level, torch.Tensor)
    values = np.asarray(noise_level.tolist() if is_tensor else noise_level, np.float32)
    levels = np.broadcast_to(values, (b,)).copy()
    is_drawable = (levels > 0) & (levels <= 1)
    interval = "(0, 1]"
    if symmetric:
        is_drawable &= levels < 1
        interval = "(0, 1), since the complementary masks get 1 - noise_level"
    if not is_drawable.all():
        raise ValueError(
            f"noise_level is {levels.tolist()}, expected values in {interval}: at 0 nothing is "
            "masked"
        )
    return levels


def draw_noise_levels(
    sample_indices: Sequence[int],
    seed: int,
    group_size: int = 1,
    *,
    symmetric: bool = False,
    window: NoiseWindow = EVERYTHING,
    blocks: np.ndarray | None = None,
) -> np.ndarray:
    """Return λ for each index of the training stream: (b,) float32, in (ε, 1) and in `window`.

    An index gets the same λ in any process and any batch.

    Args:
        symmetric: True to draw from (ε, 1 − ε).
        blocks: (b, k) numbers of blocks, to return a λ (b, k) for each of them. Block 0 gets the λ
            that the sample would get.
    """
    u = stratified_uniform(
        sample_indices,
        group_size,
        shift=partial(random_of, seed, _SHIFT_STREAM),
        value=partial(random_of, seed, _LEVEL_STREAM),
    )
    if blocks is not None:
        u = (u[:, None] + blocks * _NEXT_BLOCK) % 1  # (b, k)
    check_drawable(window, symmetric)
    top = 1 - MIN_NOISE_LEVEL if symmetric else 1.0
    low, high = max(window.low, MIN_NOISE_LEVEL), min(window.high, top)
    levels = (low + (high - low) * u).astype(np.float32)
    if high < top:  # rounding could reach the window's end, which doesn't belong to the window
        levels = levels.clip(max=np.nextafter(np.float32(high), np.float32(0)))
    return levels


def check_drawable(window: NoiseWindow, complementary: bool = False) -> None:
    """Raise ValueError if no λ can be drawn from the window.

    For complementary masks, also raise it if the window contains some λ but not 1 − λ.
    """
    top = 1 - MIN_NOISE_LEVEL if complementary else 1.0
    limits = f"min_noise_level is {window.low} and max_noise_level {window.high}"
    if window.low >= top or window.high <= MIN_NOISE_LEVEL:
        raise ValueError(
            f"{limits}, but masked shares go from {MIN_NOISE_LEVEL} to {top:g}: widen the window."
        )
    if complementary and abs(window.low + window.high - 1) > 1e-9:
        low = min(window.low, 1 - window.high)
        raise ValueError(
            f"{limits}, and complementary masks need 1 − λ beside each λ: leave complementary out, "
            f"or take a window that is symmetric about 0.5, such as {low:g} to {1 - low:g}."
        )


def draw_masks(
    answer: np.ndarray, noise_level: np.ndarray, sample_indices: Sequence[int], *, seed: int
) -> np.ndarray:
    """Draw a mask (b, l) bool over the answers (b, l) bool, by Bernoulli(λ).

    The j-th token of an answer always gets the same random number. The masks of one (seed, index)
    therefore grow with λ, and losses at two λ are compared on nested masks.

    Args:
        noise_level: λ (b,) of each answer, or (b, k) of each of its k equal parts.
    """
    parts = noise_level.reshape(len(answer), -1).astype(np.float64)
    limits = parts.repeat(answer.shape[1] // parts.shape[1], 1)
    return answer & (_token_uniforms(answer, sample_indices, seed) < limits)


def draw_counted_masks(
    answer: np.ndarray, noise_level: np.ndarray, sample_indices: Sequence[int], *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mask k = ⌈λ n⌉ of the n tokens of each answer or part, the first by their random numbers.

    The arguments and random numbers are those of `draw_masks`.

    Returns:
        The masks, and k / n, the λ that they have, in the shape of `noise_level`.
    """
    levels = noise_level.reshape(len(answer), -1)  # (b, k)
    sizes = answer.reshape(*levels.shape, -1).sum(2)
    counts = np.ceil(levels * sizes)
    uniform = _token_uniforms(answer, sample_indices, seed).reshape(*levels.shape, -1)
    masked = uniform.argsort(2).argsort(2) < counts[..., None]
    exact = np.where(sizes > 0, counts / sizes.clip(1), levels).astype(np.float32)
    return masked.reshape(answer.shape), exact.reshape(noise_level.shape)


def _token_uniforms(answer: np.ndarray, sample_indices: Sequence[int], seed: int) -> np.ndarray:
    """Return a random number in [0, 1) for each token of the answers (b, l), and 1 elsewhere."""
    uniform = np.ones(answer.shape)
    for row, columns in enumerate(answer):
        random = random_of(seed, _MASK_STREAM, sample_indices[row])
        uniform[row, columns] = random.random(int(columns.sum()))
    return uniform


def random_of(seed: int, stream: int, number: int) -> np.random.Generator:
    """Return the random generator of one sample, for one purpose."""
    return np.random.default_rng((seed, stream, number))


def seed_and_indices(
    seed: int | None, sample_indices: Lengths | None, generator: torch.Generator | None, b: int
) -> tuple[int, list[int]]:
    """Return the seed and the indices of the b samples, which fix all random numbers."""
    if seed is None:
        if sample_indices is not None:
            raise ValueError("sample_indices came without a seed: pass seed=, or leave both out")
        device = "cpu" if generator is None else generator.device
        (seed,) = torch.randint(2**62, (1,), generator=generator, device=device).tolist()
        assert seed is not None
    indices = list(range(b)) if sample_indices is None else list(host_list(sample_indices))
    if len(indices) != b:
        raise ValueError(
            f"sample_indices is {indices}, but the batch is {b}: pass one index per sample"
        )
    return seed, indices
