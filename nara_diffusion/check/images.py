"""The check of Stable Diffusion XL: the step of train_scripts/dreambooth_sdxl.py, with a static LoRA in place of the
adapter. Images of a class, for prior preservation, are left out, and so are adapters of text encoders, which run before
there is a λ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import LoraConfig

from nara_diffusion.check.measurement import Batch, CheckTask
from nara_diffusion.dreambooth.dataset import DreamBoothDataset, collate_draws
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser, tokenizers_of
from nara_diffusion.dreambooth.prompts import PromptCache
from nara_diffusion.dreambooth.step import TrainingStep


def image_task(
    pipe: Any,
    config: LoraConfig,
    step: TrainingStep,
    dataset: DreamBoothDataset,
    *,
    batch_size: int,
    gradient_checkpointing: bool = False,
) -> CheckTask:
    """A training of the UNet of `pipe`, which has no adapter yet, and to which the static LoRA `config` is added.

    Args:
        step: of the training; its model is replaced.
        dataset: of the training.
        batch_size: samples of a forward.
        gradient_checkpointing: recompute activations in the backward.

    Raises:
        ValueError: see `AdaptedDenoiser`.
    """
    prompts = step.prompts or PromptCache(tokenizers_of(pipe), [pipe.text_encoder, pipe.text_encoder_2])
    model = AdaptedDenoiser(pipe, config, gradient_checkpointing=gradient_checkpointing)
    own = replace(step, model=model.train(), prompts=prompts)

    def batch(positions: Sequence[int]) -> Batch:
        instances = [{"draws": dataset.draws(position)[:1]} for position in positions]
        generator = torch.Generator().manual_seed(step.seed * 1_000_003 + positions[0])
        return Batch(partial(own, collate_draws(instances)), torch.rand(len(positions), generator=generator))

    return CheckTask(model, batch, batch_size)
