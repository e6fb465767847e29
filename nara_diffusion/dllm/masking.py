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

Blocks (LLaDA2): an answer token is drawn uniformly, and the step trains its block, so that each
token has the same weight. The prompt and earlier blocks are clean; later blocks are cut off.

Complementary masks: each sequence appears twice, with mask m at λ = t and ¬m at λ = 1 − t, so a
step trains each answer token once. t ~ U(ε, 1 − ε) keeps both 1/λ finite. A window has to contain
both λ.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from nara_diffusion.noise.drawn_levels import EVERYTHING, NoiseWindow

from .answer_places import Lengths, active_blocks, host_answers, moved
from .mask_draws import BLOCK_STREAM, draw_masks, draw_noise_levels, random_of, seed_and_indices


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
    is_padded = answer_lengths is not None
    if block_length is not None:
        draws = [random_of(seed, BLOCK_STREAM, index).random() for index in indices]
        answer, ends = active_blocks(answer, np.array(draws), block_length)
        rest = answer.shape[1] - input_ids.shape[1]
        input_ids = F.pad(input_ids, (0, rest))  # a negative rest cuts
        is_padded = True
    if noise_level is None:
        levels = draw_noise_levels(
            indices, seed, group_size or b, symmetric=complementary, window=window
        )
    else:
        levels = given_levels(noise_level, b, complementary)
    masked = draw_masks(answer, levels, indices, seed=seed)  # (b, l)
    attention_mask = None
    if is_padded:
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
