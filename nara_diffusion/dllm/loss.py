"""Losses of masked language models: the training objective, and the loss at given noise levels.

The objective is that of LLaDA's supervised fine-tuning (arXiv 2502.09992, algorithm 2). n_i is the
length of answer i, including the EOS padding that is trained on. Each sequence has its own λ, and
the adapters run at this λ:

    L = 1/B Σ_i  1/n_i Σ_{j masked}  − log p(x_ij | masked x_i) / λ_i

For a model with attention by blocks (LLaDA2), each block of an answer has its own λ, which divides
its losses. The adapters run at this λ in the block, and at λ = 0 in the clean text.

dFactory, the trainer of LLaDA2, has one λ ~ U(0.3, 0.8) for all blocks of an answer, and the flat
mean of the losses of its masked tokens (`flat`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from .batches import AnswerCollator, batches_of
from .masking import MaskedBatch, mask_answers
from .models.backbone import Backbone, evaluating, without_ddp
from .models.forward_rows import conditioned, guided, rows_of_guidance


@dataclass(frozen=True, kw_only=True)
class MaskedDiffusionLoss(MaskedBatch):
    """The loss of a masked batch of b' rows: b, or 2b with complementary masks.

    Attributes:
        loss: scalar, the mean of `per_sample`.
        per_sample: (b',) the loss of each sequence, divided by λ and the length of the answer; or
            the mean over its masked tokens.
        token_loss: (b', l) cross-entropy in nats; zero at positions that aren't masked.
    """

    loss: Tensor
    per_sample: Tensor
    token_loss: Tensor

    @property
    def sums(self) -> tuple[Tensor, Tensor]:
        """Σ_j − log p / n and Σ_j 1 / n over the masked tokens j of each row, (b',) float64."""
        lengths = self.answer.sum(1)
        return self.token_loss.double().sum(1) / lengths, self.masked.double().sum(1) / lengths


def masked_diffusion_loss(
    model: nn.Module,
    input_ids: Tensor,
    prompt_lengths: Tensor | Sequence[int],
    *,
    mask_token_id: int | None = None,
    chunk_size: int | None = 256,
    flat: bool = False,
    **masking: Any,
) -> MaskedDiffusionLoss:
    """Mask the answers at random, and return the loss of `model` in filling them in.

    Args:
        model: the outermost module, as `accelerator.prepare` or `get_peft_model` returned it. The
            loss calls this module itself, not an inner one.
        input_ids: (b, l) clean tokens: prompt, answer, padding on the right.
        prompt_lengths: (b,) the number of tokens before each answer. Pass all lengths and indices
            as lists or CPU tensors, since the host would have to wait for other devices.
        mask_token_id: the mask token; by default `model.config.mask_token_id`.
        chunk_size: the number of masked positions with logits in memory at the same time. Backward
            computes the logits again. None computes all logits at once, as most trainers do, with
            the same result. If the head is adapted or can't be reached (`Backbone.head` is None),
            all logits are always computed at once.
        flat: True for the mean over the masked tokens of each sequence, without 1 / λ.
        **masking: arguments of `mask_answers`: answer_lengths (b,); noise_level, a λ in (0, 1], as
            (b,) or one number, instead of a drawn λ; generator, or seed with sample_indices (b,);
            group_size; complementary; window; one_level.

    Raises:
        ValueError: there is no mask token; the adapter was trained with a λ that isn't the masked
            share; or an answer has no prompt, but the model predicts the next token. See also
            `mask_answers`.
    """
    backbone = Backbone(model)
    masking["block_length"] = backbone.block_length
    mask = backbone.mask_token_id(mask_token_id)
    batch = mask_answers(input_ids, prompt_lengths, mask_token_id=mask, **masking)
    return batch_loss(model, batch, chunk_size, flat)


def batch_loss(
    model: nn.Module, batch: MaskedBatch, chunk_size: int | None = 256, flat: bool = False
) -> MaskedDiffusionLoss:
    """Return the loss of a masked batch; see `masked_diffusion_loss`."""
    token_loss = masked_cross_entropy(model, batch, chunk_size=chunk_size)  # (b', l)
    if flat:
        per_sample = token_loss.sum(1) / batch.masked.sum(1).clamp(min=1)
    else:
        levels = batch.noise_level.view(len(token_loss), -1)  # (b', 1), or (b', k) of blocks
        of_levels = token_loss.unflatten(1, (levels.shape[1], -1)).sum(2) / levels
        per_sample = of_levels.sum(1) / batch.answer.sum(1)
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
) -> Tensor:
    """Return −log p of the clean token at each masked position, and zero elsewhere.

    The result is (b, l), in float32 or float64, for the l positions of `targets`.

    Args:
        cfg_scale: w of classifier-free guidance (`backbone.guided`). With 0, there is no guidance.
            Rows with masked prompts run at the λ of their sample.
        mask_token_id: the mask token for guidance; by default `model.config.mask_token_id`.
    """
    backbone = Backbone(model)
    opens = batch.opens
    if backbone.is_shifted and (batch.answer[:, 0].any() if opens is None else opens):
        raise ValueError(
            "an answer begins its row, and this model predicts the next token, so nothing "
            "predicts the first: begin the row with a BOS token, and count it in prompt_lengths"
        )
    level = batch.noise_level if batch.forward_level is None else batch.forward_level
    ids, padding = batch.input_ids, batch.attention_mask
    if cfg_scale > 0:
        is_prompt = batch.answer.cumsum(1) == 0  # (b, l)
        mask = backbone.mask_token_id(mask_token_id)
        ids, padding, level = rows_of_guidance(ids, padding, level, is_prompt, mask)
    with conditioned(model, level):
        head = None if chunk_size is None else backbone.head
        # an adapted head needs whole rows, each with its λ
        if head is None or chunk_size is None or hasattr(head, "lora_A"):
            logits = backbone.logits(ids, padding, position_ids=batch.position_ids)
            logits = guided(_by_prompt(logits, batch), cfg_scale)  # (b, l, v)
            return token_cross_entropy(logits, batch.targets) * batch.masked

        def losses_of(hidden: Tensor) -> Tensor:
            hidden = _by_prompt(hidden, batch)
            return _chunked_losses(head, hidden, batch, chunk_size, cfg_scale)

        return backbone.losses_in_place_of_logits(head, ids, padding, losses_of, batch.position_ids)


def _by_prompt(states: Tensor, batch: MaskedBatch) -> Tensor:
    """Return `states` (b or 2b, l', …) as (1 or 2, b, l, …): prompt visible, then prompt masked.

    Clean copies of blocks, which have no targets, are left out.
    """
    b, length = batch.targets.shape
    return states[:, :length].unflatten(0, (-1, b))


def _chunked_losses(
    head: nn.Module, hidden: Tensor, batch: MaskedBatch, chunk_size: int, cfg_scale: float
) -> Tensor:
    """Return − log p of the clean tokens (b, l) from hidden states (1 or 2, b, l, d), in chunks."""
    places = batch.places  # (m,)
    if places is None:
        places = batch.masked.flatten().nonzero()[:, 0]
    counts = batch.masked.new_ones(len(places))
    if not len(places):
        # one place with weight zero, since every parameter has to get a gradient
        places, counts = places.new_zeros(1), batch.masked.new_zeros(1)

    def loss(hidden: Tensor, targets: Tensor) -> Tensor:
        return token_cross_entropy(guided(head.forward(hidden), cfg_scale), targets)

    at_places = hidden.flatten(1, 2)[:, places]  # (1 or 2, m, d)
    targets = batch.targets.flatten()[places]  # (m,)
    of_masks = by_chunks(loss, at_places, targets, chunk_size) * counts
    everywhere = of_masks.new_zeros(batch.masked.numel())
    return everywhere.scatter(0, places, of_masks).view_as(batch.masked)


def by_chunks(
    loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, targets: Tensor, chunk_size: int
) -> Tensor:
    """Return the losses (m,) of m places, computed chunk by chunk.

    Backward begins with the last chunk and computes each chunk before it again, so the logits of
    only one chunk exist at a time.

    Args:
        loss: a function of hidden states (n, c, d) and tokens (c,) that returns losses (c,).
        hidden: (n, m, d).
        targets: (m,) tokens.
        chunk_size: the maximum of c.
    """
    losses: list[Tensor] = []
    chunks = list(zip(hidden.split(chunk_size, 1), targets.split(chunk_size), strict=True))
    for chunk in chunks:
        if torch.is_grad_enabled() and chunk is not chunks[-1]:
            recomputed: Any = checkpoint(loss, *chunk, use_reentrant=False)
            losses.append(recomputed)
        else:
            losses.append(loss(*chunk))
    return torch.cat(losses)


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return − log p(target) in float32 or higher: (…, v), (…) → (…)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view_as(targets)


@torch.no_grad()
def noise_level_curve(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    noise_levels: Sequence[float],
    *,
    loss: Callable[..., Any] = masked_diffusion_loss,
    collator: AnswerCollator | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """Return the validation loss at each noise level, in nats per masked token.

    This is the training objective at fixed λ, but with the actual number of masked tokens instead
    of the expected number, λ·n:

        loss(λ) = Σ_i (1/n_i) Σ_{j masked} − log p(x_ij)  /  Σ_i (1/n_i) Σ_{j masked} 1

    The sums run over all rows i, with answers of n_i tokens. This ratio has a low variance. The
    masks depend only on (seed, row, λ) and grow with λ, so two models are compared on the same
    masks, and two λ on nested masks.

    Args:
        model: the outermost module.
        rows: rows from `encode_records`.
        noise_levels: λ in (0, 1].
        loss: the objective. Of DiffusionGemma, `canvas_loss.block_diffusion_loss`; the curve is then
            the mean of its losses per sample.
        collator: the collator that makes batches of rows. Padding that it marks as trained counts.
            By default only each answer and its end count.

    Returns:
        One loss for each noise level; NaN if no token was masked.

    Raises:
        ValueError: a noise level is outside (0, 1].
    """
    model = without_ddp(model)
    backbone = Backbone(model)
    padding = backbone.configured("pad_token_id") or 0
    collate = collator or AnswerCollator(padding, trained_padding=0)
    losses = []
    size = len(noise_levels) * len(rows)
    bar = tqdm(total=size, desc="loss over λ", unit="row", disable=not progress)
    with evaluating(model), bar:
        for level in noise_levels:
            total = count = 0.0
            for batch in batches_of(rows, range(len(rows)), collate, batch_size, backbone.device):
                batch_loss = loss(model, **batch, noise_level=level, seed=seed)
                of_rows, weights = batch_loss.sums  # (b,)
                total += of_rows.sum().item()
                count += weights.sum().item()
                bar.update(len(weights))
            losses.append(total / count if count else float("nan"))
    return losses
