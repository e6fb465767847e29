"""The check of a masked language model: the loss of train_scripts/dllm.py, with a static LoRA as the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel

from nara_diffusion.check.measurement import Batch, CheckTask
from nara_diffusion.dllm.data import AnswerCollator
from nara_diffusion.dllm.loss import mask_token_of, masked_diffusion_loss
from nara_diffusion.dllm.masking import mask_answers
from nara_diffusion.noise_window import EVERYTHING, NoiseWindow
from nara_diffusion.training.adapter import add_adapter
from nara_diffusion.training.stream import ShuffledStream


def text_task(
    model: PreTrainedModel,
    config: LoraConfig,
    rows: Any,
    collator: AnswerCollator,
    *,
    device: torch.device,
    seed: int,
    batch_size: int,
    group_size: int,
    complementary: bool = False,
    window: NoiseWindow = EVERYTHING,
) -> CheckTask:
    """A training of `model`, to which the static LoRA `config` is added.

    Args:
        rows: of training, encoded.
        seed: of order, λ, masks, and of which token R² looks at.
        batch_size: samples of a forward.
        group_size: samples of an optimizer step, over which λ is stratified.
        complementary: train on each sample twice, with complementary masks.
        window: of λ.

    Raises:
        ValueError: see `add_adapter`.
    """
    adapted = add_adapter(model.to(device), config)  # type: ignore[arg-type]
    stream = ShuffledStream(rows, seed)
    draws: dict[str, Any] = {"seed": seed, "group_size": group_size, "complementary": complementary, "window": window}

    def batch(positions: Sequence[int]) -> Batch:
        inputs = {name: value.to(device) for name, value in collator([stream[p] for p in positions]).items()}
        masked = mask_answers(**inputs, mask_token_id=mask_token_of(model), **draws).masked  # those of the loss
        generator = torch.Generator().manual_seed(seed * 1_000_003 + positions[0])
        return Batch(partial(masked_diffusion_loss, adapted, **inputs, **draws), masked_place(masked, generator))

    return CheckTask(adapted.train(), batch, batch_size)


def masked_place(masked: Tensor, generator: torch.Generator) -> Tensor:
    """(b, l) bool → (b,) in [0, 1): the middle of one masked token of each row, any of them; −1 where none is."""
    masked = masked.cpu()
    rank = torch.rand(masked.shape, generator=generator).masked_fill(~masked, -1)
    return ((rank.argmax(1) + 0.5) / masked.shape[1]).where(masked.any(1), -1.0)
