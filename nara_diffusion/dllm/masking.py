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
into `group_size` equal strata. Each of as many consecutive indices takes one (`noise.drawn_levels`).

Blocks (LLaDA2): each block of an answer has its own λ. The model sees [noisy | clean], the masked
blocks beside clean copies of the text before the last block (`noise.blocks`). Each masked block
therefore sees what it sees in generation, and one forward trains all of them.

Complementary masks: each sequence appears twice, with mask m at λ = t and ¬m at λ = 1 − t, so a
step trains each answer token once. t ~ U(ε, 1 − ε) keeps both 1/λ finite. A window has to contain
both λ.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from nara_diffusion.noise.blocks import block_mask, paired_positions
from nara_diffusion.noise.level import EVERYTHING, NoiseWindow

from .answer_places import Lengths, answer_blocks, host_answers, moved
from .mask_draws import draw_counted_masks, draw_masks, noise_levels, seed_and_indices


@dataclass(frozen=True)
class MaskedBatch:
    """A batch after masking.

    Attributes:
        input_ids: (b, l) the tokens that the model sees, with the mask token at masked positions;
            with blocks (b, l'), l' ≥ l: the l noisy positions, then clean copies.
        targets: (b, l) the clean tokens.
        masked: (b, l) bool, the masked positions.
        answer: (b, l) bool, the positions that could have been masked.
        noise_level: float32, λ of the answers (b,), or of each of the l / B blocks (b, l / B).
        attention_mask: (b, l) int64, 1 on prompt and answer; None if nothing is padded. With blocks
            (b, 1, l', l') bool, the keys that each position sees.
        places: (m,) int64, the indices of True in the flattened `masked`; None if unknown on the
            host.
        opens: True if an answer begins its row; None if unknown on the host.
        position_ids: (1, l') with blocks, else None.
        forward_level: with blocks (b, l' / B), the λ of a forward, 0 in all that isn't masked; None
            if it is `noise_level`.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    masked: torch.Tensor
    answer: torch.Tensor
    noise_level: torch.Tensor
    attention_mask: torch.Tensor | None
    places: torch.Tensor | None = None
    opens: bool | None = None
    position_ids: torch.Tensor | None = field(default=None, kw_only=True)
    forward_level: torch.Tensor | None = field(default=None, kw_only=True)


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
    one_level: bool = False,
    counted: bool = False,
) -> MaskedBatch:
    """Mask a share λ of each answer, or of each of its blocks; see the equations above.

    Everything is checked and drawn on the CPU, and then moved to the device of `input_ids`.

    Args:
        input_ids: (b, l) clean tokens: prompt, answer, padding on the right.
        prompt_lengths: (b,) the number of tokens before each answer.
        mask_token_id: the mask token.
        answer_lengths: (b,) the number of tokens of each answer. By default answers end at l.
        noise_level: λ in (0, 1], as (b,) or one number, also for all blocks. None draws λ.
        generator: the generator that draws the seed if `seed` is None.
        seed: the seed of the random numbers, together with `sample_indices`.
        sample_indices: (b,) indices of the samples in the training stream.
        group_size: the number of consecutive samples to stratify drawn λ over. The default is the
            batch; 1 draws each λ independently.
        complementary: True to return 2b rows, the second half with the complementary masks.
        window: the window that λ is drawn from.
        block_length: B; None for a model that sees the whole text.
        one_level: True to draw one λ for all blocks of an answer.
        counted: True to mask k = ⌈λ n⌉ of the n tokens of an answer or block, at λ = k / n.

    Raises:
        ValueError: a row has no answer or is longer than l; λ is outside (0, 1]; there are indices
            without a seed; or no λ can be drawn from the window (see `check_drawable`).
    """
    b, device = len(input_ids), input_ids.device
    answer, ends = host_answers(input_ids, prompt_lengths, answer_lengths)
    seed, indices = seed_and_indices(seed, sample_indices, generator, b)
    opens = bool(answer[:, 0].any())
    blocks = clean = None
    if block_length is not None:
        answer, start = answer_blocks(answer, block_length)  # (b, l)
        width = start + answer.shape[1]
        text = F.pad(input_ids, (0, width - input_ids.shape[1]))  # a negative number cuts
        input_ids, clean = text[:, start:], text[:, : width - block_length]
        if not one_level:
            number = np.arange(answer.shape[1] // block_length)
            blocks = number - answer.argmax(1)[:, None] // block_length  # from an answer's first
    levels = noise_levels(
        noise_level,
        indices,
        seed,
        group_size,
        symmetric=complementary,
        window=window,
        blocks=blocks,
    )
    if counted:
        if block_length and clean is not None and levels.ndim == 1:
            levels = levels[:, None].repeat(answer.shape[1] // block_length, 1)  # (b, k)
        masked, levels = draw_counted_masks(answer, levels, indices, seed=seed)
    else:
        masked = draw_masks(answer, levels, indices, seed=seed)  # (b, l)
    targets = input_ids
    if complementary:
        masked = np.concatenate([masked, answer & ~masked])  # (2b, l)
        levels = np.concatenate([levels, 1 - levels])  # (2b, …)
        answer, ends = np.concatenate([answer, answer]), np.concatenate([ends, ends])
        targets = targets.repeat(2, 1)
    is_masked = moved(masked, device)
    seen = targets.masked_fill(is_masked, mask_token_id)
    attention_mask = positions = forward_level = None
    if block_length and clean is not None:
        seen = torch.cat([seen, clean.repeat(len(seen) // b, 1)], 1)
        positions = paired_positions(seen.shape[1], block_length, answer.shape[1], device)[None]
        real = positions < moved(ends, device)[:, None]
        attention_mask = block_mask(real, block_length, noisy=answer.shape[1])
        holds_answer = answer.reshape(len(answer), -1, block_length).any(2)  # (b, l / B)
        noisy = holds_answer * levels.reshape(len(answer), -1)
        forward_level = F.pad(moved(noisy, device), (0, clean.shape[1] // block_length))
    elif answer_lengths is not None:
        real = np.arange(answer.shape[1]) < ends[:, None]
        attention_mask = moved(real.astype(np.int64), device)
    return MaskedBatch(
        input_ids=seen,
        targets=targets,
        masked=is_masked,
        answer=moved(answer, device),
        noise_level=moved(levels, device),
        attention_mask=attention_mask,
        places=moved(np.flatnonzero(masked), device),
        opens=opens,
        position_ids=positions,
        forward_level=forward_level,
    )
