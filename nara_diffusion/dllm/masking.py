"""Masking: from a noise level λ (b,) to the masked positions (b, l) of the answers.

    t ~ U(ε, 1) for each sequence;  masked_j ~ Bernoulli(t) for each j of the answer;  λ = t

This is the masking of LLaDA's supervised fine-tuning (arXiv 2502.09992, algorithm 2). The prompt is
never masked. A sequence consists of prompt, answer and padding, with lengths `prompt_lengths` and
`answer_lengths` (b,). All checks and draws happen on the CPU, before anything moves to a device.

Random numbers depend only on (seed, index of the sample in the training stream). A sample has the
same λ and masks for any number of processes, batch size, order and padding, and a resumed run
needs no random state. Without `seed` and `sample_indices`, a seed is drawn from `generator` (or
torch's global generator), and the indices are 0 … b − 1.

Stratified λ: the interval (ε, 1), or its intersection with a window of noise levels, is divided
into `group_size` equal strata. Each of as many consecutive indices takes one (`noise.level`).

Blocks (LLaDA2): an answer token is drawn uniformly, and the step trains its block, so that each
token has the same weight. The prompt and earlier blocks are clean; later blocks are cut off.

Complementary masks: each sequence appears twice, with mask m at λ = t and ¬m at λ = 1 − t, so a
step trains each answer token once. t ~ U(ε, 1 − ε) keeps both 1/λ finite. A window has to contain
both λ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from nara_diffusion.noise.drawn_levels import EVERYTHING, NoiseWindow, stratified_uniform

Lengths = torch.Tensor | Sequence[int]
"""Lengths or indices. Pass lists or CPU tensors: the host needs the values, and would have to wait
for any other device."""

MIN_NOISE_LEVEL = 1e-3
"""ε: the smallest λ that training draws."""

_SHIFT_STREAM, _LEVEL_STREAM, _MASK_STREAM, _BLOCK_STREAM = range(4)


@dataclass(frozen=True)
class MaskedBatch:
    """A batch after masking.

    Attributes:
        input_ids: (b, l) the tokens that the model sees, with the mask token at masked positions.
        targets: (b, l) the clean tokens.
        masked: (b, l) bool, the masked positions.
        answer: (b, l) bool, the positions that could have been masked.
        noise_level: (b,) float32, λ of the answer or of the active block.
        attention_mask: (b, l) int64, 1 on prompt and answer; None if nothing is padded.
        places: (m,) int64, the indices of True in the flattened `masked`; None if unknown on the
            host.
        opens: True if an answer begins its row; None if unknown on the host.
        block_length: B, if `answer` is only a block of the answer. l is then a multiple of B.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    masked: torch.Tensor
    answer: torch.Tensor
    noise_level: torch.Tensor
    attention_mask: torch.Tensor | None
    places: torch.Tensor | None = None
    opens: bool | None = None
    block_length: int | None = field(default=None, kw_only=True)

    @property
    def forward_level(self) -> torch.Tensor:
        """The λ of a forward: (b,), or with blocks (b, l / B), 0 except in the active block."""
        if self.block_length is None:
            return self.noise_level
        is_active = self.answer.unflatten(1, (-1, self.block_length)).any(2)  # (b, l / B)
        return is_active * self.noise_level[:, None]


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
    block_length: int | None = None,
) -> MaskedBatch:
    """Mask a share λ of each answer, or of one of its blocks; see the equations above.

    Everything is checked and drawn on the CPU, and then moved to the device of `input_ids`.

    Args:
        input_ids: (b, l) clean tokens: prompt, answer, padding on the right.
        prompt_lengths: (b,) the number of tokens before each answer.
        mask_token_id: the mask token.
        answer_lengths: (b,) the number of tokens of each answer. By default answers end at l.
        noise_level: λ in (0, 1], as (b,) or one number. None draws λ.
        generator: the generator that draws the seed if `seed` is None.
        seed: the seed of the random numbers, together with `sample_indices`.
        sample_indices: (b,) indices of the samples in the training stream.
        group_size: the number of consecutive samples to stratify drawn λ over. The default is the
            batch; 1 draws each λ independently.
        complementary: True to return 2b rows, the second half with the complementary masks.
        window: the window that λ is drawn from.
        block_length: B; None masks whole answers. With blocks, l becomes a multiple of B, the end
            of the last active block.

    Raises:
        ValueError: a row has no answer or is longer than l; λ is outside (0, 1]; there are indices
            without a seed; or no λ can be drawn from the window (see `check_drawable`).
    """
    b, device = len(input_ids), input_ids.device
    answer, ends = host_answers(input_ids, prompt_lengths, answer_lengths)
    seed, indices = seed_and_indices(seed, sample_indices, generator, b)
    if block_length is not None:
        draws = [random_of(seed, _BLOCK_STREAM, index).random() for index in indices]
        answer, ends = _active_blocks(answer, np.array(draws), block_length)
        rest = answer.shape[1] - input_ids.shape[1]
        input_ids = F.pad(input_ids, (0, rest))  # a negative rest cuts
    if noise_level is None:
        levels = draw_noise_levels(
            indices, seed, group_size or b, symmetric=complementary, window=window
        )
    else:
        levels = given_levels(noise_level, b, complementary)
    masked = draw_masks(answer, levels, indices, seed=seed)  # (b, l)
    attention_mask = None
    if answer_lengths is not None or block_length is not None:
        attention_mask = (np.arange(answer.shape[1]) < ends[:, None]).astype(np.int64)
    targets = input_ids
    if complementary:
        masked = np.concatenate([masked, answer & ~masked])  # (2b, l)
        levels = np.concatenate([levels, 1 - levels])  # (2b,)
        targets, answer = targets.repeat(2, 1), np.concatenate([answer, answer])
        if attention_mask is not None:
            attention_mask = np.concatenate([attention_mask, attention_mask])
    is_masked = moved(masked, device)
    return MaskedBatch(
        input_ids=targets.masked_fill(is_masked, mask_token_id),
        targets=targets,
        masked=is_masked,
        answer=moved(answer, device),
        noise_level=moved(levels, device),
        attention_mask=None if attention_mask is None else moved(attention_mask, device),
        places=moved(np.flatnonzero(masked), device),
        opens=bool(answer[:, 0].any()),
        block_length=block_length,
    )


def given_levels(
    noise_level: torch.Tensor | float, b: int, complementary: bool = False
) -> np.ndarray:
    """Return a given λ as (b,) float32.

    Raises:
        ValueError: λ or its complement masks nothing, or there are neither 1 nor b values.
    """
    is_tensor = isinstance(noise_level, torch.Tensor)
    values = np.asarray(noise_level.tolist() if is_tensor else noise_level, np.float32)
    levels = np.broadcast_to(values, (b,)).copy()
    is_drawable = (levels > 0) & (levels <= 1)
    interval = "(0, 1]"
    if complementary:
        is_drawable &= levels < 1
        interval = "(0, 1), since the complementary masks get 1 - noise_level"
    if not is_drawable.all():
        raise ValueError(
            f"noise_level is {levels.tolist()}, expected values in {interval}: at 0 nothing is "
            "masked"
        )
    return levels


# ---------------------------------------------------------------- draws


def draw_noise_levels(
    sample_indices: Sequence[int],
    seed: int,
    group_size: int = 1,
    *,
    symmetric: bool = False,
    window: NoiseWindow = EVERYTHING,
) -> np.ndarray:
    """Return λ for each index of the training stream: (b,) float32, in (ε, 1) and in `window`.

    An index gets the same λ in any process and any batch.

    Args:
        symmetric: True to draw from (ε, 1 − ε).
    """
    u = stratified_uniform(
        sample_indices,
        group_size,
        shift=partial(random_of, seed, _SHIFT_STREAM),
        value=partial(random_of, seed, _LEVEL_STREAM),
    )
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
    given = f"min_noise_level is {window.low} and max_noise_level {window.high}"
    if window.low >= top or window.high <= MIN_NOISE_LEVEL:
        raise ValueError(
            f"{given}, but masked shares go from {MIN_NOISE_LEVEL} to {top:g}: widen the window."
        )
    if complementary and abs(window.low + window.high - 1) > 1e-9:
        low = min(window.low, 1 - window.high)
        raise ValueError(
            f"{given}, and complementary masks need 1 − λ beside each λ: leave complementary out, "
            f"or take a window that is symmetric about 0.5, such as {low:g} to {1 - low:g}."
        )


def draw_masks(
    answer: np.ndarray, noise_level: np.ndarray, sample_indices: Sequence[int], *, seed: int
) -> np.ndarray:
    """Draw a mask (b, l) bool over the answers (b, l) bool, by Bernoulli(λ) with λ (b,).

    The j-th token of an answer always gets the same random number. The masks of one (seed, index)
    therefore grow with λ, and losses at two λ are compared on nested masks.
    """
    uniform = np.ones(answer.shape)
    for row, columns in enumerate(answer):
        random = random_of(seed, _MASK_STREAM, sample_indices[row])
        uniform[row, columns] = random.random(int(columns.sum()))
    return answer & (uniform < noise_level[:, None].astype(np.float64))


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
    indices = list(range(b)) if sample_indices is None else list(_host_list(sample_indices))
    if len(indices) != b:
        raise ValueError(
            f"sample_indices is {indices}, but the batch is {b}: pass one index per sample"
        )
    return seed, indices


# ---------------------------------------------------------------- where the answers are


def answer_positions(
    input_ids: torch.Tensor,
    prompt_lengths: Lengths,
    *,
    answer_lengths: Lengths | None = None,
) -> torch.Tensor:
    """Return the positions of the answers: (b, l) bool.

    Raises:
        ValueError: the lengths aren't one whole number for each row, or an answer is empty or
            longer than its row.
    """
    return moved(host_answers(input_ids, prompt_lengths, answer_lengths)[0], input_ids.device)


def host_answers(
    input_ids: torch.Tensor, prompt_lengths: Lengths, answer_lengths: Lengths | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the answers (b, l) bool, and their ends (b,), on the CPU.

    Raises:
        ValueError: see `answer_positions`.
    """
    b, width = input_ids.shape
    starts = _lengths("prompt_lengths", prompt_lengths, b)
    ends = np.full(b, width)
    if answer_lengths is not None:
        ends = starts + _lengths("answer_lengths", answer_lengths, b)
    is_bad = (starts < 0) | (ends <= starts) | (ends > width)
    if is_bad.any():
        row = int(is_bad.argmax())
        raise ValueError(
            f"row {row} of the batch: its answer would fill positions {starts[row]} to "
            f"{ends[row]} of {width}; an answer needs at least one token, and has to end "
            "within its row"
        )
    positions = np.arange(width)
    return (positions >= starts[:, None]) & (positions < ends[:, None]), ends


def _active_blocks(
    answer: np.ndarray, draws: np.ndarray, block_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the answer positions (b, l') bool in the block of a drawn token, and their ends (b,).

    Blocks have B positions of the sequence, prompt included. l' is the end of the last block.

    Args:
        draws: (b,) in [0, 1), the place of the drawn token in its answer.
    """
    token = (draws * answer.sum(1)).astype(np.int64)  # (b,)
    place = (answer.cumsum(1) <= token[:, None]).sum(1)  # in the sequence
    block = place // block_length
    width = int(block.max() + 1) * block_length
    whole = np.zeros((len(answer), width), dtype=bool)
    cut = answer[:, :width]
    whole[:, : cut.shape[1]] = cut
    active = whole & (np.arange(width) // block_length == block[:, None])
    ends = width - active[:, ::-1].argmax(1)
    return active, ends


def _lengths(name: str, lengths: Lengths, b: int) -> np.ndarray:
    found = np.asarray(_host_list(lengths))
    if found.dtype.kind not in "iu" or found.shape != (b,):
        raise ValueError(f"{name} is {lengths!r}: pass a whole number for each of the {b} rows")
    return found


def _host_list(values: Lengths) -> Sequence[int]:
    """Return `values` on the CPU."""
    return values.tolist() if isinstance(values, torch.Tensor) else values


def moved(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return `values` as a tensor on `device`, without waiting for the copy."""
    return torch.from_numpy(values).to(device, non_blocking=True)
