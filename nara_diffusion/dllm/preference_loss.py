"""Direct preference optimisation (DPO) of a masked language model, with the variance reduction of
LLaDA 1.5 (VRPO, arXiv 2505.19223):

    loss = − log σ(margin),    margin = β (r(chosen) − r(rejected))
    r(y) = 1/K Σ_k  n/m_k Σ_{j masked in draw k}  log p(y_j | masked y) − log p_ref(y_j | masked y)

r is the difference of two likelihood bounds, of the trained model and of the reference, which is
the model with its adapter disabled. Draw k of K masks m_k = ⌈λ_k n⌉ of the n tokens of an answer,
or of each of its blocks, and runs at λ = m_k / n. The draws are what reduces the variance:

    - the trained model and the reference get the same masks and λ;
    - so do the chosen and the rejected answer, token by token as far as both go;
    - one mask for each λ, and λ_k = λ_1 + k / K modulo 1, evenly spread over the noise levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from .loss import batch_loss
from .mask_draws import draw_noise_levels
from .masking import mask_answers
from .models.backbone import Backbone


@dataclass(frozen=True)
class PreferenceLoss:
    """The loss of b pairs.

    Attributes:
        loss: scalar, the mean of `per_sample`.
        per_sample: (b,) the loss of each pair.
        margin: (b,) β times the difference of the log-likelihood ratios, in nats.
        accuracy: (b,) 1 if the margin is positive, 0 if it is negative, and one half if it is 0.
        noise_level: (b,) the λ of the first draw.
    """

    loss: Tensor
    per_sample: Tensor
    margin: Tensor
    accuracy: Tensor
    noise_level: Tensor


def preference_loss(
    model: nn.Module,
    input_ids: Tensor,
    prompt_lengths: Sequence[int],
    answer_lengths: Sequence[int],
    *,
    sample_indices: Sequence[int],
    seed: int,
    beta: float = 0.1,
    draws: int = 8,
    noise_level: Tensor | None = None,
    group_size: int = 1,
    **masking: Any,
) -> PreferenceLoss:
    """Return the DPO loss of b pairs, against `model` with its adapter disabled.

    The trained model runs 2b · draws rows in one forward, and the reference as many, without
    gradients.

    Args:
        model: the outermost module, with an adapter of PEFT.
        input_ids: (2b, l) the chosen answers after their prompts, then the rejected ones, as
            `AnswerCollator` returns rows that have a "rejected" text.
        prompt_lengths, answer_lengths: (2b,) as in `mask_answers`.
        sample_indices: (2b,) the index of each pair in the training stream, twice.
        seed, group_size: see `mask_answers`.
        beta: β.
        draws: K.
        noise_level: (2b,) the λ of the first draw, in (0, 1]; None draws it.
        **masking: further arguments of `mask_answers`.
    """
    if noise_level is None:
        noise_level = torch.tensor(draw_noise_levels(sample_indices, seed, group_size))
    turns = noise_level[:, None] + torch.arange(draws) / draws  # (2b, K)
    levels = 1 + turns - turns.ceil()  # in (0, 1]
    rows = {
        "input_ids": input_ids,
        "prompt_lengths": prompt_lengths,
        "answer_lengths": answer_lengths,
    }
    batch = mask_answers(
        **repeated(rows, draws),
        mask_token_id=Backbone(model).mask_token_id(),
        block_length=Backbone(model).block_length,
        noise_level=levels.flatten(),
        seed=seed,
        sample_indices=[draws * index + k for index in sample_indices for k in range(draws)],
        counted=True,
        **masking,
    )
    with torch.no_grad(), without_adapter(model):
        reference = batch_loss(model, batch).per_sample
    ratios = (reference - batch_loss(model, batch).per_sample) * batch.answer.sum(1)
    chosen, rejected = ratios.unflatten(0, (2, -1, draws)).mean(2)  # (b,) each
    margin = beta * (chosen - rejected)
    losses, accuracy = -F.logsigmoid(margin), (1 + margin.sign()) / 2
    return PreferenceLoss(losses.mean(), losses, margin, accuracy, noise_level[: len(margin)])


def repeated(batch: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Return a batch with each row `times` times in a row."""
    return {
        name: torch.as_tensor(values).repeat_interleave(times, 0) for name, values in batch.items()
    }


def without_adapter(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which the adapter of `model`, also inside wrappers, is disabled."""
    return next(part for part in model.modules() if isinstance(part, PeftModel)).disable_adapter()
