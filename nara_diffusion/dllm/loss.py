"""LLaDA's objective for supervised fine-tuning, arXiv 2502.09992, algorithm 2.

    L = 1/B Σ_i  1/n_i Σ_{j masked}  − log p(x_ij | masked x_i) / λ_i

with n_i the length of answer i, its EOS padding included where that is trained on. Each sequence has its own λ and
its adapters are told that one. Where the base is held outside of a window of λ, the sequences that are masked so have

    W  1/n_i Σ_{j masked}  KL(p₀(· | masked x_i) ‖ p(· | masked x_i)) / λ_i

in place of it, p₀ being the model with its adapters disabled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nara_diffusion.dllm.evaluation.base_divergence import base_hidden_states, divergence, divergence_loss
from nara_diffusion.dllm.models.lm_head import (
    configured,
    cross_entropy_loss,
    head_of,
    language_model,
    losses_in_head,
    token_cross_entropy,
)
from nara_diffusion.dllm.models.virtual_tokens import of_text
from nara_diffusion.noise.window import EVERYTHING, NoiseWindow
from nara_diffusion.training.base_hold import SplitLosses, as_base, check_has_base, rows_for_base

from .masking import MaskedBatch, mask_answers
from .noise_conditioning import conditioned

LOGITS = ("masked", "all")


@dataclass(frozen=True)
class MaskedDiffusionLoss:
    """The loss of a batch and its parts; b' is 2b with complementary masks, else b.

    Attributes:
        loss: scalar, the mean of `per_sample`.
        per_sample: (b',) each sequence's share, divided by its λ and its answer's length; times W if held.
        noise_level: (b',) float32, λ.
        masked: (b', l) bool.
        token_loss: (b', l) cross-entropy, or KL(p₀ ‖ p) where the base is held; zero where nothing is masked.
        answer: (b', l) bool.
        split: the shares of `per_sample` without W; None unless the base is held.
    """

    loss: torch.Tensor
    per_sample: torch.Tensor
    noise_level: torch.Tensor
    masked: torch.Tensor
    token_loss: torch.Tensor
    answer: torch.Tensor
    split: SplitLosses | None = None


def masked_diffusion_loss(
    model: nn.Module,
    input_ids: torch.Tensor,
    prompt_lengths: torch.Tensor | Sequence[int],
    *,
    attention_mask: torch.Tensor | None = None,
    answer_lengths: torch.Tensor | Sequence[int] | None = None,
    noise_level: torch.Tensor | float | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    sample_indices: torch.Tensor | Sequence[int] | None = None,
    stratified: bool = True,
    group_size: int | None = None,
    complementary: bool = False,
    window: NoiseWindow = EVERYTHING,
    mask_token_id: int | None = None,
    logits: str = "masked",
    chunk_size: int = 256,
) -> MaskedDiffusionLoss:
    """Mask the answers at random, and score how well `model` fills them in.

    Args:
        model: the outermost module, as `accelerator.prepare` or `get_peft_model` returned it; it is entered by its
            `__call__`.
        input_ids: (b, l) clean tokens: prompt, answer, padding on the right.
        prompt_lengths: (b,) tokens before the answer.
        attention_mask: (b, l), 1 on prompt and answer, 0 on the padding to their right.
        answer_lengths: (b,), instead of `attention_mask`; without both, answers end at l.
        noise_level: λ in (0, 1], (b,) or one number, instead of drawing it.
        generator: draws the seed if `seed` is None.
        seed: with `sample_indices`, makes random numbers the same at any number of processes (see
            `nara_diffusion.dllm.masking`).
        sample_indices: (b,) indices of the samples in the training stream.
        stratified: whether drawn λ are stratified over each `group_size` consecutive indices.
        group_size: by default the batch.
        complementary: train on every sequence twice, with complementary masks.
        window: that λ is drawn from; outside of it the model's base is held, if the window says so.
        mask_token_id: default `model.config.mask_token_id`.
        logits: "masked" computes logits at masked positions, `chunk_size` at a time, and again in backward; "all"
            computes them everywhere at once, as most trainers do. The values are the same. Models whose head can't be
            reached (`nara_diffusion.dllm.models.lm_head.head_of` is None) always take "all".
        chunk_size: positions whose logits exist at one time.

    Raises:
        ValueError: see `mask_answers`; or an unknown `logits`; or no mask token; or an adapter that was trained with
            another λ than the masked share; or the base is to be held, and the model has no adapter.
    """
    if window.hold_weight is not None:
        check_has_base(model)
    batch = mask_answers(
        input_ids,
        prompt_lengths,
        mask_token_id=mask_token_of(model, mask_token_id),
        attention_mask=attention_mask,
        answer_lengths=answer_lengths,
        noise_level=noise_level,
        generator=generator,
        seed=seed,
        sample_indices=sample_indices,
        stratified=stratified,
        group_size=group_size,
        complementary=complementary,
        window=window,
    )
    held = None if window.hold_weight is None else window.held(batch.noise_level)  # (b',)
    token_loss = _token_losses(model, batch, held, logits=logits, chunk_size=chunk_size)  # (b', l)
    per_sample, split = token_loss.sum(1) / batch.noise_level / batch.answer.sum(1), None
    if window.hold_weight is not None and held is not None:
        split = SplitLosses(per_sample, batch.noise_level, held)
        per_sample = split.weighted(window.hold_weight)
    return MaskedDiffusionLoss(
        loss=per_sample.mean(),
        per_sample=per_sample,
        noise_level=batch.noise_level,
        masked=batch.masked,
        token_loss=token_loss,
        answer=batch.answer,
        split=split,
    )


def masked_cross_entropy(
    model: nn.Module, batch: MaskedBatch, *, logits: str = "masked", chunk_size: int = 256
) -> torch.Tensor:
    """− log p of the clean token at each masked position, zero elsewhere: (b, l), float32 or wider."""
    return _token_losses(model, batch, None, logits=logits, chunk_size=chunk_size)


def _token_losses(
    model: nn.Module, batch: MaskedBatch, held: torch.Tensor | None, *, logits: str, chunk_size: int
) -> torch.Tensor:
    """`masked_cross_entropy`, but KL(p₀ ‖ p) in rows that are `held` (b,)."""
    if logits not in LOGITS:
        raise ValueError(f"logits is {logits!r}, expected one of {', '.join(map(repr, LOGITS))}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected 1 at least")
    padding = {} if batch.attention_mask is None else {"attention_mask": batch.attention_mask}
    head = head_of(model) if logits == "masked" else None
    base = None if held is None else _base_states(model, head, batch, held)
    with conditioned(model, batch.noise_level, masked=batch.masked, answer=batch.answer):
        if head is None:
            output = of_text(model, logits_of(model(batch.input_ids, **padding)), batch.masked.shape[1])  # (b, l, v)
            losses = token_cross_entropy(output, batch.targets)
            if base is not None and held is not None:
                losses = torch.where(held[:, None], divergence(base, output), losses)
            return losses * batch.masked
        losses = [cross_entropy_loss(batch.targets, batch.masked)]
        if base is not None and held is not None:
            inside, outside = batch.masked & ~held[:, None], batch.masked & held[:, None]
            losses = [cross_entropy_loss(batch.targets, inside), divergence_loss(base, outside)]
        with losses_in_head(model, head, losses, chunk_size=chunk_size):
            output = logits_of(model(batch.input_ids, **padding))  # (b, l, 1)
    if output.shape != (*batch.masked.shape, 1):
        raise ValueError(
            f"{type(language_model(model)).__name__} changes what its output head returns, so that the loss can't be "
            'computed within it: pass logits="all"'
        )
    return output.squeeze(-1)


def _base_states(model: nn.Module, head: nn.Module | None, batch: MaskedBatch, held: torch.Tensor) -> torch.Tensor:
    """The input (b, l, d) of the base's head, or without a head its logits (b, l, v); zero in rows not `held` (b,)."""
    rows = rows_for_base(held)
    padding = {} if batch.attention_mask is None else {"attention_mask": batch.attention_mask[rows]}
    ids = batch.input_ids[rows]
    if head is None:
        with as_base(model):
            states = of_text(model, logits_of(model(ids, **padding)), ids.shape[1])
    else:
        states = base_hidden_states(model, head, ids, **padding)
    return states.new_zeros(len(held), *states.shape[1:]).index_copy(0, rows, states)


def logits_of(output: object) -> torch.Tensor:
    """The logits of a forward: `output.logits`, or `output` itself where a model returns a bare tensor."""
    return output if isinstance(output, torch.Tensor) else output.logits  # type: ignore[attr-defined]


def mask_token_of(model: nn.Module, mask_token_id: int | None = None) -> int:
    """`mask_token_id` if given, else the one in the model's configuration.

    Raises:
        ValueError: neither names one.
    """
    known = configured(model, "mask_token_id") if mask_token_id is None else mask_token_id
    if known is None:
        raise ValueError(
            "the model's configuration has no mask_token_id: load it with load_backbone(…, mask_token_id=N), "
            "or pass mask_token_id=N here"
        )
    return int(known)
