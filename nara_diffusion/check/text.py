"""The check of a masked-diffusion language model: the loss of train_scripts/dllm.py, with the published NaRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from nara_diffusion.dllm.data.collator import AnswerCollator, GlobalBatchStream
from nara_diffusion.dllm.loss import MaskedDiffusionLoss, masked_diffusion_loss
from nara_diffusion.noise.signals import MASKED_SHARE
from nara_diffusion.noise.window import EVERYTHING
from nara_diffusion.training.adapters.build import add_adapter
from nara_diffusion.training.adapters.configs import adapter_config

from .held import free_window, with_base_losses
from .trial import CheckTask, Loss, published


def text_task(
    model: PreTrainedModel,
    args: Any,
    rows: Any,
    held_out: Any,
    collator: AnswerCollator,
    objective: Mapping[str, Any],
    device: torch.device,
) -> CheckTask:
    """A training of `model`, which has no adapter yet.

    Args:
        args: the fields of AdapterArguments and OptimizationArguments.
        rows: the encoded training rows.
        held_out: the rows to measure on; `rows`, which then get other masks, if there are too few.
        collator: makes a batch of rows.
        objective: the arguments of `masked_diffusion_loss` in training, beside model and batch.

    Raises:
        ValueError: see `add_adapter`.
    """
    args = published(args)
    config = adapter_config(args, noise_convention=MASKED_SHARE)
    adapted = add_adapter(model.to(device), config)  # type: ignore[arg-type]

    def loss_of(part: Any, **changes: Any) -> Callable[[Sequence[int]], MaskedDiffusionLoss]:
        loss = partial(masked_diffusion_loss, adapted, **{**objective, **changes})
        stream = GlobalBatchStream(part, args.seed, objective["group_size"])

        def positioned(positions: Sequence[int]) -> MaskedDiffusionLoss:
            return loss(**{name: value.to(device) for name, value in collator([stream[p] for p in positions]).items()})

        return positioned

    measured: Loss = loss_of(held_out)
    if (window := objective.get("window", EVERYTHING)).hold_weight is not None:
        measured = with_base_losses(adapted, measured, loss_of(held_out, window=free_window(window)))
    step_samples = objective["group_size"]
    return CheckTask(adapted.train(), config, args, loss_of(rows), measured, args.train_batch_size, step_samples)
