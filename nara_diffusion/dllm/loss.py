"""Losses of masked language models: the objective, and the same at chosen noise levels.

LLaDA's objective for supervised fine-tuning (arXiv 2502.09992, algorithm 2), with n_i the length of answer i, its EOS
padding included where that is trained on; each sequence has its own λ, and its adapters run at that:

    L = 1/B Σ_i  1/n_i Σ_{j masked}  − log p(x_ij | masked x_i) / λ_i
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .batches import AnswerCollator
from .conditioning import ForwardRows, conditioned
from .masking import MaskedBatch, mask_answers
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
    return batch_loss(
        model, mask_answers(input_ids, prompt_lengths, mask_token_id=mask, **masking), chunk_size
    )


def batch_loss(
    model: nn.Module, batch: MaskedBatch, chunk_size: int | None = 256
) -> MaskedDiffusionLoss:
    """The loss of a batch that is masked already; see `masked_diffusion_loss`."""
    token_loss = masked_cross_entropy(model, batch, chunk_size=chunk_size)  # (b', l)
    per_sample = token_loss.sum(1) / batch.noise_level / batch.answer.sum(1)
    return MaskedDiffusionLoss(
        **vars(batch), loss=per_sample.mean(), per_sample=per_sample, token_loss=token_loss
    )


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
    rows = ForwardRows(batch.input_ids, batch.attention_mask, batch.noise_level)
    if cfg_scale > 0:
        is_prompt = batch.answer.cumsum(1) == 0  # (b, l)
        rows = rows.with_masked_prompts(is_prompt, backbone.mask_token_id(mask_token_id))
    with conditioned(model, rows.noise_level):
        return backbone.token_losses(
            rows.input_ids,
            batch.targets,
            batch.masked,
            rows.attention_mask,
            chunk_size=chunk_size,
            cfg_scale=cfg_scale,
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
    collate = collator or AnswerCollator(
        backbone.configured("pad_token_id") or 0, trained_padding=0
    )
    losses = []
    bar = tqdm(
        total=len(noise_levels) * len(rows), desc="loss over λ", unit="row", disable=not progress
    )
    with evaluating(model), bar:
        for level in noise_levels:
            total = count = 0.0
            for batch in batches_of(rows, range(len(rows)), collate, batch_size, device):
                masked = mask_answers(**batch, mask_token_id=mask, noise_level=level, seed=seed)
                lengths = masked.answer.sum(1)
                total += (
                    (masked_cross_entropy(model, masked).double().sum(1) / lengths).sum().item()
                )
                count += (masked.masked.double().sum(1) / lengths).sum().item()
                bar.update(len(lengths))
            losses.append(total / count if count else float("nan"))
    return losses


def batches_of(
    rows: Sequence[Mapping[str, Any]],
    indices: Sequence[int],
    collator: AnswerCollator,
    batch_size: int,
    device: Any,
) -> Iterator[dict[str, Any]]:
    """The rows at `indices` as batches on `device`; their random numbers are keyed by the index."""
    for start in range(0, len(indices), batch_size):
        batch = collator([{**rows[i], "position": i} for i in indices[start : start + batch_size]])
        yield {name: value.to(device) for name, value in batch.items()}
