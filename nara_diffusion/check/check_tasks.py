"""What is checked: the step of a train script's run on its data, with the published NaRA as the adapter.

Samples to measure on are the validation data; where they are too few, the training data with other masks or noise. Of
images, prior preservation is left out, and so are adapters of text encoders, which don't depend on λ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from nara_diffusion.dllm.data.collator import GlobalBatchStream
from nara_diffusion.dllm.loss import MaskedDiffusionLoss, masked_diffusion_loss
from nara_diffusion.dreambooth.cache import PromptCache
from nara_diffusion.dreambooth.dataset import DreamBoothDataset, collate_samples
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser
from nara_diffusion.dreambooth.image_arguments import run_family
from nara_diffusion.dreambooth.training_step import DreamBoothLoss
from nara_diffusion.noise.level import MASKED_SHARE
from nara_diffusion.training.adapters import adapter_config, add_adapter

from .trials import CheckTask, published
from .verdict import check_training


def check_text(tuning: Any) -> dict[str, Any]:
    """What check.json holds of a `dllm.train.FineTuning`, whose backbone has no adapter yet."""
    args, objective, device = published(tuning.args), tuning.objective, tuning.run.accelerator.device
    config: Any = adapter_config(args, noise_convention=MASKED_SHARE)
    model = add_adapter(tuning.backbone, config).to(device).train()

    def loss_of(rows: Any) -> Callable[[Sequence[int]], MaskedDiffusionLoss]:
        stream = GlobalBatchStream(rows, args.seed, objective["group_size"])

        def loss(positions: Sequence[int]) -> MaskedDiffusionLoss:
            batch = tuning.collator([stream[position] for position in positions])
            return masked_diffusion_loss(model, **{k: v.to(device) for k, v in batch.items()}, **objective)

        return loss

    losses = loss_of(tuning.train_rows), loss_of(tuning.validation_rows)
    return check_training(CheckTask(model, config, args, *losses, objective["group_size"]), tuning.run)


def check_images(tuning: Any) -> dict[str, Any]:
    """What check.json holds of a `dreambooth.train.FineTuning`, whose pipeline has no adapter yet."""
    args, pipe, step = published(tuning.args), tuning.pipe, tuning.step
    config: Any = adapter_config(args, noise_convention=step.objective.source.convention)
    family = run_family(args, pipe)
    model = AdaptedDenoiser(pipe, config, gradient_checkpointing=args.gradient_checkpointing, family=family)
    own = replace(step, model=model.train(), prompts=step.prompts or PromptCache(pipe, family))

    def loss_of(images: DreamBoothDataset) -> Callable[[Sequence[int]], DreamBoothLoss]:
        return lambda positions: own(collate_samples([{"samples": images.samples_at(p)[:1]} for p in positions]))

    losses = loss_of(tuning.dataset), loss_of(tuning.measured_on)
    return check_training(CheckTask(model, config, args, *losses, step.group_size), tuning.run)
