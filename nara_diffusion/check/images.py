"""The check of an image model: the step of train_scripts/dreambooth.py, with the published NaRA as the adapter.

Prior preservation is left out, and so are adapters of text encoders, which don't depend on λ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from nara_diffusion.dreambooth.cache import PromptCache
from nara_diffusion.dreambooth.data.dataset import DreamBoothDataset, collate_samples
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser
from nara_diffusion.dreambooth.setup import run_family
from nara_diffusion.dreambooth.training_step import DreamBoothLoss, TrainingStep
from nara_diffusion.training.adapters.configs import adapter_config

from .trial import CheckTask, Loss, published


def image_task(
    pipe: Any, args: Any, step: TrainingStep, dataset: DreamBoothDataset, held_out: DreamBoothDataset
) -> CheckTask:
    """A training of the denoiser of `pipe`, which has no adapter yet.

    Args:
        args: a DreamBoothArguments.
        step: the loss of the training; its model is replaced.
        dataset: the training data.
        held_out: the data to measure on; `dataset`, which then gets other noise, if there are too few images.

    Raises:
        ValueError: see `AdaptedDenoiser`.
    """
    args = published(args)
    config = adapter_config(args, noise_convention=step.objective.source.convention)
    family = run_family(args, pipe)
    prompts = step.prompts or PromptCache(pipe, family)
    model = AdaptedDenoiser(pipe, config, gradient_checkpointing=args.gradient_checkpointing, family=family)
    own = replace(step, model=model.train(), prompts=prompts)

    def loss_of(images: DreamBoothDataset, of: TrainingStep = own) -> Callable[[Sequence[int]], DreamBoothLoss]:
        return lambda positions: of(collate_samples([{"samples": images.samples_at(p)[:1]} for p in positions]))

    measured: Loss = loss_of(held_out)
    return CheckTask(model, config, args, loss_of(dataset), measured, args.train_batch_size, step.group_size)
