"""Corrupt a canvas with uniform random tokens, as in the training of DiffusionGemma.

    t ~ U(ε, 1) for each sample;  changed_j ~ Bernoulli(t) for each j of the canvas;  λ = t
    canvas_j = a token of the vocabulary, drawn uniformly, if changed_j; else the clean token

An answer is split into blocks of `canvas_length` positions, its *canvases*. One canvas is drawn for
each sample. The prompt and all earlier blocks stay clean. A drawn token may equal the clean token,
and the canvas doesn't show which tokens changed.

As in `masking`, random numbers depend only on (seed, index of the sample in the training stream),
and drawn λ are stratified.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nara_diffusion.noise.drawn_levels import EVERYTHING, NoiseWindow

from .answer_places import Lengths, host_answers, moved
from .mask_draws import BLOCK_STREAM, draw_masks, noise_levels, random_of, seed_and_indices

_TOKEN_STREAM, _SELF_STREAM = 4, 5  # after those of `mask_draws`


@dataclass(frozen=True)
class CanvasBatch:
    """A batch after corruption, with one canvas for each sample.

    Attributes:
        input_ids: (b, l) the clean tokens, padded on the right.
        predicted: (b, l) bool, the positions that the encoder's loss counts: those of the answers,
            or of prompts and answers, except in the first column.
        places: (m,) the indices of True in the flattened `predicted`.
        starts: (b,) the start of each canvas in its row.
        canvas: (b, c) the corrupted tokens, which the decoder sees.
        targets: (b, c) the clean tokens.
        supervised: (b, c) bool, the positions inside the answer. Only these count in the loss.
        noise_level: (b,) float32, λ.
        self_conditioned: (b,) bool, the samples that see the logits of the first pass in the second
            pass; None if there is only one pass.
    """

    input_ids: Tensor
    predicted: Tensor
    places: Tensor
    starts: Tensor
    canvas: Tensor
    targets: Tensor
    supervised: Tensor
    noise_level: Tensor
    self_conditioned: Tensor | None


def corrupt_canvases(
    input_ids: Tensor,
    prompt_lengths: Lengths,
    *,
    canvas_length: int,
    vocab_size: int,
    answer_lengths: Lengths | None = None,
    noise_level: Tensor | float | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    sample_indices: Lengths | None = None,
    group_size: int | None = None,
    window: NoiseWindow = EVERYTHING,
    self_conditioning: float = 0.5,
    predict_prompts: bool = False,
) -> CanvasBatch:
    """Replace a share λ of one canvas of each answer with random tokens.

    See the equations in the module's docstring. The positions of a canvas after the end of its
    answer always hold random tokens.

    The other arguments are those of `mask_answers`.

    Args:
        canvas_length: c, the number of positions in a block.
        vocab_size: the end of the range 0 … vocab_size − 1 that random tokens are drawn from.
        self_conditioning: the share of self-conditioned samples, in [0, 1]. With 0, there is no
            first pass.
        predict_prompts: True if the encoder's loss also counts the tokens of the prompts.

    Raises:
        ValueError: see `mask_answers`.
    """
    b, device = len(input_ids), input_ids.device
    on_host, ends = host_answers(input_ids, prompt_lengths, answer_lengths)  # (b, l)
    seed, indices = seed_and_indices(seed, sample_indices, generator, b)
    levels = noise_levels(noise_level, indices, seed, group_size, window=window)
    random = partial(random_of, seed)
    blocks = (on_host.sum(1) + canvas_length - 1) // canvas_length  # (b,)
    chosen = [random(BLOCK_STREAM, i).integers(n) for i, n in zip(indices, blocks, strict=True)]
    starts = moved(on_host.argmax(1) + canvas_length * np.array(chosen), device)  # (b,)
    answer = moved(on_host, device)
    is_predicted = on_host.copy()  # by the token before it
    if predict_prompts:
        is_predicted = np.arange(input_ids.shape[1]) < ends[:, None]
    is_predicted[:, 0] = False
    targets, supervised = _canvases(input_ids, answer, starts, canvas_length)
    tokens = [random(_TOKEN_STREAM, i).integers(vocab_size, size=canvas_length) for i in indices]
    noise = moved(np.stack(tokens), device)  # (b, c)
    everywhere = np.ones((b, canvas_length), dtype=bool)
    changed = moved(draw_masks(everywhere, levels, indices, seed=seed), device)  # (b, c)
    canvas = torch.where(changed | ~supervised, noise, targets)
    conditioned = None
    if self_conditioning:
        draws = np.array([random(_SELF_STREAM, i).random() for i in indices])
        conditioned = moved(draws < self_conditioning, device)
    return CanvasBatch(
        input_ids,
        moved(is_predicted, device),
        moved(np.flatnonzero(is_predicted), device),
        starts,
        canvas,
        targets,
        supervised,
        moved(levels, device),
        conditioned,
    )


def _canvases(
    input_ids: Tensor, answer: Tensor, starts: Tensor, canvas_length: int
) -> tuple[Tensor, Tensor]:
    """Return the canvases (b, c) of rows (b, l), and which of their positions are answers."""
    positions = starts[:, None] + torch.arange(canvas_length, device=starts.device)  # (b, c)
    inside = positions < input_ids.shape[1]
    positions = positions.clamp(max=input_ids.shape[1] - 1)
    return input_ids.gather(1, positions), answer.gather(1, positions) & inside
