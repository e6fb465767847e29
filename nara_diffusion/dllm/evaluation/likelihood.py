"""Monte-Carlo likelihood of answers under a masked language model (arXiv 2502.09992, equation 6).

    log p(x | prompt)  ≥  − E_{k ~ U{1 … n}}  E_{masks of k tokens}  (n / k) Σ_{j masked} − log p(x_j | masked x)

Drawing the number of masked tokens, k, has less variance than drawing a probability, and k is stratified: sample s of S
takes k from the s-th part of {1 … n}. Where n tokens have no more than S masks, 2ⁿ − 1 ≤ S, all of them are run,
each by its weight 1 / (n · C(n, k)): no randomness is left. The model is told λ = k / n.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import comb

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from nara_diffusion.dllm.loss import mask_token_of, masked_cross_entropy
from nara_diffusion.dllm.masking import MaskedBatch, answer_positions
from nara_diffusion.dllm.models.shifted_logits import opening_token
from nara_diffusion.utils.eval_mode import evaluating, without_ddp


@torch.no_grad()
def log_likelihood(
    model: nn.Module,
    input_ids: torch.Tensor,
    prompt_lengths: torch.Tensor | Sequence[int],
    *,
    attention_mask: torch.Tensor | None = None,
    answer_lengths: torch.Tensor | Sequence[int] | None = None,
    samples: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    sample_indices: Sequence[int] | None = None,
    mask_token_id: int | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """The lower bound above, in nats, for each answer: (b,) float64.

    Args:
        model: the outermost module.
        input_ids: (b, l) prompt, answer, padding on the right.
        prompt_lengths: (b,) tokens before the answer; 0 if there are none, where a model that predicts the next token
            (Dream) sees a BOS token in front.
        attention_mask: (b, l), as for `masked_diffusion_loss`.
        answer_lengths: (b,), instead of `attention_mask`.
        samples: S, the number of masks of an answer.
        batch_size: masked sequences of one forward; they may belong to several answers.
        seed: the seed of the masks.
        sample_indices: (b,). The masks of row i depend on (seed, sample_indices[i]) and on the answer's length alone;
            by default on (seed, i). Rows with the same index and length are compared on the same masks.

    Raises:
        ValueError: see `answer_positions`; samples or batch_size is below 1; rows and sample indices differ in number.
    """
    if samples < 1 or batch_size < 1:
        raise ValueError(f"samples is {samples} and batch_size {batch_size}: both have to be 1 at least")
    indices = range(len(input_ids)) if sample_indices is None else sample_indices
    if len(indices) != len(input_ids):
        raise ValueError(f"sample_indices has {len(indices)} values, input_ids {len(input_ids)} rows: one each")
    mask = mask_token_of(model, mask_token_id)
    model = without_ddp(model)
    answers = answer_positions(input_ids, prompt_lengths, attention_mask=attention_mask, answer_lengths=answer_lengths)
    input_ids, answers = _opened(model, input_ids, answers)
    tasks = []
    for row, (answer, index) in enumerate(zip(answers, indices, strict=True)):
        masks, weights = _weighted_masks(answer, samples, seed, index)
        tasks += [_Task(row, masked, weight) for masked, weight in zip(masks, weights.tolist(), strict=True)]
    losses = torch.zeros(len(input_ids), dtype=torch.float64, device=input_ids.device)
    with evaluating(model), tqdm(total=len(tasks), desc="likelihood", unit="mask", disable=not progress) as bar:
        for width, chosen in _batches(tasks, answers, batch_size):
            rows = torch.tensor([task.row for task in chosen], device=input_ids.device)
            weights = torch.tensor([task.weight for task in chosen], device=input_ids.device, dtype=torch.float64)
            masked = torch.stack([task.masked[:width] for task in chosen])
            batch = _masked_batch(input_ids[rows, :width], answers[rows, :width], masked, mask)
            token_loss = masked_cross_entropy(model, batch).double()  # (s, width)
            share = masked.sum(1).double() / batch.answer.sum(1)  # λ
            losses.index_add_(0, rows, token_loss.sum(1) * weights / share)
            bar.update(len(chosen))
    return -losses


def _opened(model: nn.Module, input_ids: torch.Tensor, answers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both, (b, l), and where the model needs it (b, 1 + l) with a BOS token before rows that have no prompt."""
    empty = answers[:, :1]  # (b, 1)
    opening = opening_token(model) if empty.any() else None
    if opening is None:
        return input_ids, answers
    input_ids = torch.where(empty, F.pad(input_ids, (1, 0), value=opening), F.pad(input_ids, (0, 1)))
    return input_ids, torch.where(empty, F.pad(answers, (1, 0)), F.pad(answers, (0, 1)))


@dataclass(frozen=True)
class _Task:
    """One masked sequence: `row` with the mask `masked` (l,), whose loss has `weight` in the mean of the row."""

    row: int
    masked: torch.Tensor
    weight: float


def _weighted_masks(answer: torch.Tensor, samples: int, seed: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Different masks (m, l) and their weights (m,), which sum to 1."""
    n = int(answer.sum())
    if n < 63 and 2**n - 1 <= samples:
        return all_masks(answer)
    masks, _ = stratified_masks(answer, samples, np.random.default_rng((seed, index)))
    different, times = masks.unique(dim=0, return_counts=True)
    return different, times / samples


def all_masks(answer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each mask (2ⁿ − 1, l) of the n tokens of an `answer` (l,), and its probability (2ⁿ − 1,), 1 / (n · C(n, k))."""
    n = int(answer.sum())
    bits = torch.arange(1, 2**n, device=answer.device)[:, None] >> torch.arange(n, device=answer.device)
    masks = torch.zeros(len(bits), len(answer), dtype=torch.bool, device=answer.device)
    masks[:, answer] = (bits & 1).bool()
    probability = torch.tensor([0.0, *(1 / (n * comb(n, k)) for k in range(1, n + 1))], dtype=torch.float64)
    return masks, probability.to(answer.device)[masks.sum(1)]


def stratified_masks(
    answer: torch.Tensor, samples: int, random: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks (S, l) of k (S,) tokens of an `answer` (l,), k stratified over 1 … n."""
    n = int(answer.sum())
    places = (np.arange(samples) + random.random(samples)) / samples  # one in each S-th of [0, 1)
    counts = torch.from_numpy(1 + np.minimum((places * n).astype(np.int64), n - 1)).to(answer.device)
    order = torch.from_numpy(random.random((samples, n)).argsort(1).argsort(1)).to(answer.device)  # ranks (S, n)
    masks = torch.zeros(samples, len(answer), dtype=torch.bool, device=answer.device)
    masks[:, answer] = order < counts[:, None]
    return masks, counts


def _batches(tasks: Sequence[_Task], answers: torch.Tensor, batch_size: int) -> Iterator[tuple[int, Sequence[_Task]]]:
    """(length, tasks of that length), so that nothing is padded and no row's result depends on those beside it."""
    ends = [int(answer.nonzero().max()) + 1 for answer in answers]
    for width, group in groupby(sorted(tasks, key=lambda task: ends[task.row]), key=lambda task: ends[task.row]):
        alike = list(group)
        for start in range(0, len(alike), batch_size):
            yield width, alike[start : start + batch_size]


def _masked_batch(targets: torch.Tensor, answer: torch.Tensor, masked: torch.Tensor, mask_token_id: int) -> MaskedBatch:
    return MaskedBatch(
        input_ids=targets.masked_fill(masked, mask_token_id),
        targets=targets,
        masked=masked,
        answer=answer,
        noise_level=masked.sum(1).float() / answer.sum(1),
        attention_mask=None,
    )
