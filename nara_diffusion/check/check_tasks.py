"""What is checked: the step of a train script on its data, with the published NaRA as the adapter.

Of images, prior preservation is left out, and so are adapters of text encoders, which don't depend on λ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from nara_diffusion.dllm.data.collator import AnswerCollator, GlobalBatchStream
from nara_diffusion.dllm.loss import MaskedDiffusionLoss, masked_diffusion_loss
from nara_diffusion.dreambooth.cache import PromptCache
from nara_diffusion.dreambooth.dataset import DreamBoothDataset, collate_samples
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser
from nara_diffusion.dreambooth.image_arguments import run_family
from nara_diffusion.dreambooth.training_step import DreamBoothLoss, TrainingStep
from nara_diffusion.noise.level import MASKED_SHARE
from nara_diffusion.training.adapters import adapter_config, add_adapter

from .trials import CheckTask, published


def text_task(
    model: PreTrainedModel,
    args: Any,
    rows: Any,
    held_out: Any,
    collator: AnswerCollator,
    objective: Mapping[str, Any],
    device: torch.device,
) -> CheckTask:
    """The training of a masked-diffusion language model, which has no adapter yet, on encoded `rows`.

    Args:
        held_out: the rows to measure on; `rows`, which then get other masks, if there are too few.
        objective: the arguments of `masked_diffusion_loss` in training, beside model and batch.
    """
    args = published(args)
    config = adapter_config(args, noise_convention=MASKED_SHARE)
    adapted = add_adapter(model, config).to(device)  # type: ignore[arg-type]

    def loss_of(part: Any) -> Callable[[Sequence[int]], MaskedDiffusionLoss]:
        stream = GlobalBatchStream(part, args.seed, objective["group_size"])

        def loss(positions: Sequence[int]) -> MaskedDiffusionLoss:
            batch = {name: value.to(device) for name, value in collator([stream[p] for p in positions]).items()}
            return masked_diffusion_loss(adapted, **batch, **objective)

        return loss

    sizes = (args.train_batch_size, objective["group_size"])
    return CheckTask(adapted.train(), config, args, loss_of(rows), loss_of(held_out), *sizes)


def image_task(
    pipe: Any, args: Any, step: TrainingStep, dataset: DreamBoothDataset, held_out: DreamBoothDataset
) -> CheckTask:
    """The training of the denoiser of `pipe`, which has no adapter yet, by the loss of `step`, on `dataset`.

    Args:
        held_out: the data to measure on; `dataset`, which then gets other noise, if there are too few images.
    """
    args = published(args)
    config = adapter_config(args, noise_convention=step.objective.source.convention)
    family = run_family(args, pipe)
    model = AdaptedDenoiser(pipe, config, gradient_checkpointing=args.gradient_checkpointing, family=family)  # type: ignore[arg-type]
    own = replace(step, model=model.train(), prompts=step.prompts or PromptCache(pipe, family))

    def loss_of(images: DreamBoothDataset) -> Callable[[Sequence[int]], DreamBoothLoss]:
        return lambda positions: own(collate_samples([{"samples": images.samples_at(p)[:1]} for p in positions]))

    sizes = (args.train_batch_size, step.group_size)
    return CheckTask(model, config, args, loss_of(dataset), loss_of(held_out), *sizes)
