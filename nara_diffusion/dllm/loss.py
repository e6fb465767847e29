"""LLaDA's objective for supervised fine-tuning, arXiv 2502.09992, algorithm 2.

    L = 1/B Σ_i  1/n_i Σ_{j masked}  − log p(x_ij | masked x_i) / λ_i

with n_i the length of answer i, its EOS padding included where that is trained on. Each sequence has its own λ, and
its adapters run at that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .masked_share import conditioned
from .masking import MaskedBatch, mask_answers
from .models.backbone import Backbone

LOGITS = ("masked", "all")


@dataclass(frozen=True)
class MaskedDiffusionLoss:
    """The loss of a batch and its parts; b' is 2b with complementary masks, else b.

    Attributes:
        loss: scalar, the mean of `per_sample`.
        per_sample: (b',) each sequence's share, divided by its λ and its answer's length.
        noise_level: (b',) float32, λ.
        masked: (b', l) bool.
        token_loss: (b', l) cross-entropy in nats; zero where nothing is masked.
        answer: (b', l) bool.
    """

    loss: torch.Tensor
    per_sample: torch.Tensor
    noise_level: torch.Tensor
    masked: torch.Tensor
    token_loss: torch.Tensor
    answer: torch.Tensor


def masked_diffusion_loss(
    model: nn.Module,
    input_ids: torch.Tensor,
    prompt_lengths: torch.Tensor | Sequence[int],
    *,
    mask_token_id: int | None = None,
    logits: str = "masked",
    chunk_size: int = 256,
    **masking: Any,
) -> MaskedDiffusionLoss:
    """Mask the answers at random, and score how well `model` fills them in.

    Args:
        model: the outermost module, as `accelerator.prepare` or `get_peft_model` returned it; it is entered by its
            `__call__`.
        input_ids: (b, l) clean tokens: prompt, answer, padding on the right.
        prompt_lengths: (b,) tokens before the answer.
        mask_token_id: default `model.config.mask_token_id`.
        logits: "masked" computes logits at masked positions, `chunk_size` at a time, and again in backward; "all"
            computes them everywhere at once, as most trainers do. The values are the same. Models whose head is adapted
            or can't be reached (`Backbone.head` is None) always take "all".
        chunk_size: positions whose logits exist at one time.
        **masking: of `mask_answers`: attention_mask (b, l) or answer_lengths (b,); noise_level, λ in (0, 1], (b,) or
            one number, instead of drawing it; generator, or seed with sample_indices (b,); group_size; complementary;
            window.

    Raises:
        ValueError: see `mask_answers`; or an unknown `logits`; or no mask token; or an adapter that was trained with
            another λ than the masked share; or an answer without a prompt, for a model that predicts the next token.
    """
    mask = Backbone(model).mask_token_id(mask_token_id)
    batch = mask_answers(input_ids, prompt_lengths, mask_token_id=mask, **masking)
    token_loss = masked_cross_entropy(model, batch, logits=logits, chunk_size=chunk_size)  # (b', l)
    per_sample = token_loss.sum(1) / batch.noise_level / batch.answer.sum(1)
    return MaskedDiffusionLoss(
        loss=per_sample.mean(),
        per_sample=per_sample,
        noise_level=batch.noise_level,
        masked=batch.masked,
        token_loss=token_loss,
        answer=batch.answer,
    )


def masked_cross_entropy(
    model: nn.Module, batch: MaskedBatch, *, logits: str = "masked", chunk_size: int = 256
) -> torch.Tensor:
    """− log p of the clean token at each masked position, zero elsewhere: (b, l), float32 or wider."""
    if logits not in LOGITS:
        raise ValueError(f"logits is {logits!r}, expected one of {', '.join(map(repr, LOGITS))}")
    backbone = Backbone(model)
    if backbone.is_shifted and batch.answer[:, 0].any():
        raise ValueError(
            "an answer begins its row, and this model predicts the next token, so that nothing predicts the first: "
            "begin the row with a BOS token, and count it in prompt_lengths"
        )
    with conditioned(model, batch.noise_level, masked=batch.masked, answer=batch.answer):
        return backbone.token_losses(
            batch.input_ids,
            batch.targets,
            batch.masked,
            batch.attention_mask,
            chunk_size=chunk_size if logits == "masked" else None,
        )
