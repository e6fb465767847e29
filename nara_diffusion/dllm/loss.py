"""Losses of masked language models: the objective, the same at chosen noise levels, and the likelihood of answers.

LLaDA's objective for supervised fine-tuning (arXiv 2502.09992, algorithm 2), with n_i the length of answer i, its EOS
padding included where that is trained on; each sequence has its own λ, and its adapters run at that:

    L = 1/B Σ_i  1/n_i Σ_{j masked}  − log p(x_ij | masked x_i) / λ_i

The Monte-Carlo likelihood of answers (equation 6 there):

    log p(x | prompt)  ≥  − E_{k ~ U{1 … n}}  E_{masks of k tokens}  (n / k) Σ_{j masked} − log p(x_j | masked x)

Drawing the number of masked tokens, k, has less variance than drawing a probability, and k is stratified: sample s of S
takes k from the s-th part of {1 … n}. Where n tokens have no more than S masks, 2ⁿ − 1 ≤ S, all of them are run,
each by its weight 1 / (n · C(n, k)): no randomness is left. The model runs at λ = k / n.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from .canvas import AnswerCollator, mask_in_a_text
from .masked_share import conditioned
from .masking import MaskedBatch, answer_positions, mask_answers
from .models.backbone import Backbone, evaluating, without_ddp


@dataclass(frozen=True)
class MaskedDiffusionLoss(MaskedBatch):
    """The loss of a masked batch of b' rows, 2b with complementary masks, else b.

    Attributes:
        loss: scalar, the mean of `per_sample`.
        per_sample: (b',) each sequence's share, divided by its λ and its answer's length.
        token_loss: (b', l) cross-entropy in nats; zero where nothing is masked.
    """

    loss: torch.Tensor
    per_sample: torch.Tensor
    token_loss: torch.Tensor


def masked_diffusion_loss(
    model: nn.Module,
    input_ids: torch.Tensor,
    prompt_lengths: torch.Tensor | Sequence[int],
    *,
    mask_token_id: int | None = None,
    chunk_size: int | None = 256,
    **masking: Any,
) -> MaskedDiffusionLoss:
    """Mask the answers at random, and score how well `model` fills them in.

    Args:
        model: the outermost module, as `accelerator.prepare` or `get_peft_model` returned it; it is entered by its
            `__call__`.
        input_ids: (b, l) clean tokens: prompt, answer, padding on the right.
        prompt_lengths: (b,) tokens before the answer.
        mask_token_id: default `model.config.mask_token_id`.
        chunk_size: masked positions whose logits exist at one time, made again in backward; None makes them everywhere
            at once, as most trainers do. The values are the same. Models whose head is adapted or can't be reached
            (`Backbone.head` is None) always do the latter.
        **masking: of `mask_answers`: answer_lengths (b,); noise_level, λ in (0, 1], (b,) or
            one number, instead of drawing it; generator, or seed with sample_indices (b,); group_size; complementary;
            window.

    Raises:
        ValueError: see `mask_answers`; or no mask token; or an adapter that was trained with
            another λ than the masked share; or an answer without a prompt, for a model that predicts the next token.
    """
    mask = Backbone(model).mask_token_id(mask_token_id)
    return batch_loss(model, mask_answers(input_ids, prompt_lengths, mask_token_id=mask, **masking), chunk_size)


def batch_loss(model: nn.Module, batch: MaskedBatch, chunk_size: int | None = 256) -> MaskedDiffusionLoss:
    """The loss of a batch that is masked already; see `masked_diffusion_loss`."""
    token_loss = masked_cross_entropy(model, batch, chunk_size=chunk_size)  # (b', l)
    per_sample = token_loss.sum(1) / batch.noise_level / batch.answer.sum(1)
    return MaskedDiffusionLoss(**vars(batch), loss=per_sample.mean(), per_sample=per_sample, token_loss=token_loss)


def masked_cross_entropy(
    model: nn.Module,
    batch: MaskedBatch,
    *,
    chunk_size: int | None = 256,
    cfg_scale: float = 0.0,
    mask_token_id: int | None = None,
) -> torch.Tensor:
    """− log p of the clean token at each masked position, zero elsewhere: (b, l), float32 or wider.

    Args:
        cfg_scale: w of classifier-free guidance (`backbone.guided`), whose other half has its prompt masked and the λ
            of its sample; 0 turns it off.
        mask_token_id: for guidance; default `model.config.mask_token_id`.
    """
    backbone = Backbone(model)
    if backbone.is_shifted and batch.answer[:, 0].any():
        raise ValueError(
            "an answer begins its row, and this model predicts the next token, so that nothing predicts the first: "
            "begin the row with a BOS token, and count it in prompt_lengths"
        )
    rows, copies = batch.input_ids, 1
    if cfg_scale > 0:
        prompt = batch.answer.cumsum(1) == 0  # (b, l)
        rows, copies = torch.cat([rows, rows.masked_fill(prompt, backbone.mask_token_id(mask_token_id))]), 2
    padding = None if batch.attention_mask is None else torch.cat([batch.attention_mask] * copies)
    with conditioned(model, torch.cat([batch.noise_level] * copies)):
        return backbone.token_losses(
            rows, batch.targets, batch.masked, padding, chunk_size=chunk_size, cfg_scale=cfg_scale
        )


# ---------------------------------------------------------------- at chosen noise levels


@torch.no_grad()
def noise_level_curve(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    noise_levels: Sequence[float],
    *,
    collator: AnswerCollator | None = None,
    batch_size: int = 16,
    seed: int = 0,
    mask_token_id: int | None = None,
    progress: bool = True,
) -> list[float]:
    """The validation loss at each noise level, in nats a masked token.

    The training objective at fixed λ, with its expected number of masked tokens λ·n replaced by the actual one:

        loss(λ) = Σ_i (1/n_i) Σ_{j masked} − log p(x_ij)  /  Σ_i (1/n_i) Σ_{j masked} 1

    over all rows i with answers of n_i tokens. That ratio, and masks that depend on (seed, row, λ) alone and grow
    with λ, keep the variance low: two models, or two λ, are compared on the same masks.

    Args:
        model: the outermost module.
        rows: of `encode_records`.
        noise_levels: λ in (0, 1].
        collator: how rows become a batch; padding that is trained on counts. Default: each answer and its end alone.

    Returns:
        One loss a noise level; NaN where no token got masked.

    Raises:
        ValueError: a noise level outside (0, 1].
    """
    model = without_ddp(model)
    backbone = Backbone(model)
    mask, device = backbone.mask_token_id(mask_token_id), backbone.device
    collate = collator or AnswerCollator(backbone.configured("pad_token_id") or 0, trained_padding=0)
    losses = []
    bar = tqdm(total=len(noise_levels) * len(rows), desc="loss over λ", unit="row", disable=not progress)
    with evaluating(model), bar:
        for level in noise_levels:
            total = count = 0.0
            for batch in batches_of(rows, range(len(rows)), collate, batch_size, device):
                masked = mask_answers(**batch, mask_token_id=mask, noise_level=level, seed=seed)
                lengths = masked.answer.sum(1)
                total += (masked_cross_entropy(model, masked).double().sum(1) / lengths).sum().item()
                count += (masked.masked.double().sum(1) / lengths).sum().item()
                bar.update(len(lengths))
            losses.append(total / count if count else float("nan"))
    return losses


def batches_of(
    rows: Sequence[Mapping[str, Any]], indices: Sequence[int], collator: AnswerCollator, batch_size: int, device: Any
) -> Iterator[dict[str, Any]]:
    """The rows at `indices` as batches on `device`; their random numbers are keyed by the index."""
    for start in range(0, len(indices), batch_size):
        batch = collator([{**rows[i], "position": i} for i in indices[start : start + batch_size]])
        yield {name: value.to(device) for name, value in batch.items()}


# ---------------------------------------------------------------- likelihood


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
    holding = ((answers.flip(1).cumsum(1).flip(1) > 0) & (input_ids == mask)).any(1)  # up to the end of the answer
    if holding.any():
        raise ValueError(f"row {int(holding.nonzero()[0])} {mask_in_a_text(mask)}")
    input_ids, answers = _opened(backbone, input_ids, answers)
    indices = range(len(input_ids)) if sample_indices is None else sample_indices
    by_length: dict[int, list[tuple[int, torch.Tensor, float]]] = {}  # so that nothing is padded
    for row, (answer, index) in enumerate(zip(answers, indices, strict=True)):
        masks, weights = weighted_masks(answer, samples, np.random.default_rng((seed, index)))
        tasks = by_length.setdefault(int(answer.nonzero().max()) + 1, [])
        tasks += [(row, masked, weight) for masked, weight in zip(masks, weights.tolist(), strict=True)]
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
                targets, answer, masked = input_ids[rows, :width], answers[rows, :width], torch.stack(masks)[:, :width]
                share = masked.sum(1).float() / answer.sum(1)  # λ
                seen = targets.masked_fill(masked, mask)
                batch = MaskedBatch(seen, targets, masked, answer, share, None)
                loss = masked_cross_entropy(model, batch, **guidance).double().sum(1)  # (s,)
                bounds.index_add_(0, rows, -loss * loss.new_tensor(weights) / share.double())
                bar.update(len(rows))
    return bounds


def _opened(backbone: Backbone, input_ids: torch.Tensor, answers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both, (b, l), and where the model needs it (b, 1 + l) with a BOS token before rows that have no prompt."""
    empty = answers[:, :1]  # (b, 1)
    opening = backbone.opening_token() if empty.any() else None
    if opening is None:
        return input_ids, answers
    input_ids = torch.where(empty, F.pad(input_ids, (1, 0), value=opening), F.pad(input_ids, (0, 1)))
    return input_ids, torch.where(empty, F.pad(answers, (1, 0)), F.pad(answers, (0, 1)))


def weighted_masks(
    answer: torch.Tensor, samples: int, random: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks (m, l) of an `answer` (l,) and their weights (m,), which sum to 1: all masks that there are, or `samples`
    of them whose number of tokens is stratified."""
    n = int(answer.sum())
    if n < 63 and 2**n - 1 <= samples:
        chosen = (torch.arange(1, 2**n)[:, None] >> torch.arange(n)) & 1 > 0  # (2ⁿ − 1, n)
        weights = torch.tensor([1 / (n * comb(n, k)) for k in chosen.sum(1).tolist()], dtype=torch.float64)
    else:
        places = (np.arange(samples) + random.random(samples)) / samples  # one in each S-th of [0, 1)
        counts = 1 + np.minimum((places * n).astype(np.int64), n - 1)
        order = random.random((samples, n)).argsort(1).argsort(1)  # ranks (S, n)
        chosen, weights = (
            torch.from_numpy(order < counts[:, None]),
            torch.full((samples,), 1 / samples, dtype=torch.float64),
        )
    masks = torch.zeros(len(chosen), len(answer), dtype=torch.bool, device=answer.device)
    masks[:, answer] = chosen.to(answer.device)
    return masks, weights
