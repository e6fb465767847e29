"""The Monte-Carlo likelihood of answers (LLaDA, arXiv 2502.09992, equation 6):

    log p(x | prompt)  ≥  − E_{k ~ U{1 … n}}  E_{masks of k tokens}  (n / k) Σ_{j masked} − log p(x_j | masked x)

Drawing the number of masked tokens, k, has less variance than drawing a probability, and k is stratified: sample s of S
takes k from the s-th part of {1 … n}. Where n tokens have no more than S masks, 2ⁿ − 1 ≤ S, all of them are run,
each by its weight 1 / (n · C(n, k)): no randomness is left. The model runs at λ = k / n.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from math import comb
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from .loss import masked_cross_entropy
from .masking import MaskedBatch, answer_positions
from .models.backbone import Backbone, evaluating, without_ddp
from .tokenizer import mask_in_a_text


def log_likelihood(
    model: nn.Module,
    input_ids: torch.Tensor,
    prompt_lengths: torch.Tensor | Sequence[int],
    *,
    answer_lengths: torch.Tensor | Sequence[int] | None = None,
    samples: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    sample_indices: Sequence[int] | None = None,
    cfg_scale: float = 0.0,
    mask_token_id: int | None = None,
    differentiable: bool = False,
    progress: bool = False,
) -> torch.Tensor:
    """The lower bound of log p above, in nats, for each answer: (b,) float64.

    Args:
        model: the outermost module.
        input_ids: (b, l) prompt, answer, padding on the right.
        prompt_lengths: (b,) tokens before the answer; 0 if there are none, where a model that predicts the next token
            (Dream) sees a BOS token in front.
        answer_lengths: (b,) tokens of each answer; without them, answers end at l.
        samples: S, the number of masks of an answer.
        batch_size: masked sequences of one forward; they may belong to several answers.
        seed: the seed of the masks.
        sample_indices: (b,). The masks of row i depend on (seed, sample_indices[i]) and on the answer's length alone;
            by default on (seed, i). Rows with the same index and length are compared on the same masks.
        cfg_scale: w of classifier-free guidance, as in `generate`; 0 turns it off.
        differentiable: keep the graph of all samples × rows, for a loss such as that of preferences; a few samples do
            then, with another seed at each step. The model stays in its mode of training, and in DDP.

    Raises:
        ValueError: see `answer_positions`; or a text that holds the mask token.
    """
    model = model if differentiable else without_ddp(model)
    backbone = Backbone(model)
    mask = backbone.mask_token_id(mask_token_id)
    answers = answer_positions(input_ids, prompt_lengths, answer_lengths=answer_lengths)
    holding = ((answers.flip(1).cumsum(1).flip(1) > 0) & (input_ids == mask)).any(
        1
    )  # up to the end of the answer
    if holding.any():
        raise ValueError(f"row {int(holding.nonzero()[0])} {mask_in_a_text(mask)}")
    input_ids, answers = _opened(backbone, input_ids, answers)
    indices = range(len(input_ids)) if sample_indices is None else sample_indices
    by_length: dict[int, list[tuple[int, torch.Tensor, float]]] = {}  # so that nothing is padded
    for row, (answer, index) in enumerate(zip(answers, indices, strict=True)):
        masks, weights = weighted_masks(answer, samples, np.random.default_rng((seed, index)))
        tasks = by_length.setdefault(int(answer.nonzero().max()) + 1, [])
        tasks += [
            (row, masked, weight) for masked, weight in zip(masks, weights.tolist(), strict=True)
        ]
    bounds = torch.zeros(len(input_ids), dtype=torch.float64, device=input_ids.device)
    total = sum(map(len, by_length.values()))
    mode = nullcontext() if differentiable else evaluating(model)
    guidance: dict[str, Any] = {"cfg_scale": cfg_scale, "mask_token_id": mask}
    with (
        torch.set_grad_enabled(differentiable),
        mode,
        tqdm(total=total, desc="likelihood", unit="mask", disable=not progress) as bar,
    ):
        for width, tasks in by_length.items():
            for start in range(0, len(tasks), batch_size):
                rows, masks, weights = zip(*tasks[start : start + batch_size], strict=True)
                rows = torch.tensor(rows, device=input_ids.device)
                targets, answer, masked = (
                    input_ids[rows, :width],
                    answers[rows, :width],
                    torch.stack(masks)[:, :width],
                )
                share = masked.sum(1).float() / answer.sum(1)  # λ
                seen = targets.masked_fill(masked, mask)
                batch = MaskedBatch(seen, targets, masked, answer, share, None)
                loss = masked_cross_entropy(model, batch, **guidance).double().sum(1)  # (s,)
                bounds.index_add_(0, rows, -loss * loss.new_tensor(weights) / share.double())
                bar.update(len(rows))
    return bounds


def _opened(
    backbone: Backbone, input_ids: torch.Tensor, answers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both, (b, l), and where the model needs it (b, 1 + l) with a BOS token before rows that have no prompt."""
    empty = answers[:, :1]  # (b, 1)
    opening = backbone.opening_token() if empty.any() else None
    if opening is None:
        return input_ids, answers
    input_ids = torch.where(
        empty, F.pad(input_ids, (1, 0), value=opening), F.pad(input_ids, (0, 1))
    )
    return input_ids, torch.where(empty, F.pad(answers, (1, 0)), F.pad(answers, (0, 1)))


def weighted_masks(
    answer: torch.Tensor, samples: int, random: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks (m, l) of an `answer` (l,) and their weights (m,), which sum to 1: all masks that there are, or `samples`
    of them whose number of tokens is stratified."""
    n = int(answer.sum())
    if n < 63 and 2**n - 1 <= samples:
        chosen = (torch.arange(1, 2**n)[:, None] >> torch.arange(n)) & 1 > 0  # (2ⁿ − 1, n)
        weights = torch.tensor(
            [1 / (n * comb(n, k)) for k in chosen.sum(1).tolist()], dtype=torch.float64
        )
    else:
        places = (
            np.arange(samples) + random.random(samples)
        ) / samples  # one in each S-th of [0, 1)
        counts = 1 + np.minimum((places * n).astype(np.int64), n - 1)
        order = random.random((samples, n)).argsort(1).argsort(1)  # ranks (S, n)
        chosen, weights = (
            torch.from_numpy(order < counts[:, None]),
            torch.full((samples,), 1 / samples, dtype=torch.float64),
        )
    masks = torch.zeros(len(chosen), len(answer), dtype=torch.bool, device=answer.device)
    masks[:, answer] = chosen.to(answer.device)
    return masks, weights
