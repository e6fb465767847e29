"""The loss of a masked language model at chosen noise levels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from nara_diffusion.dllm.data.collator import AnswerCollator
from nara_diffusion.dllm.loss import masked_cross_entropy
from nara_diffusion.dllm.masking import mask_answers
from nara_diffusion.dllm.models.backbone import Backbone, evaluating, without_ddp


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
