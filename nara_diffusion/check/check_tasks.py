"""What is checked: the step of a train script's run on its data, with the published NaRA as the adapter.

Samples to measure on are the validation data; where they are too few, the training data with other masks or noise. Of
images, prior preservation is left out, and so are adapters of text encoders, which don't depend on λ.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from nara_diffusion.dllm.data.collator import GlobalBatchStream
from nara_diffusion.dllm.data.encoding import digit_tokens
from nara_diffusion.dllm.loss import batch_loss
from nara_diffusion.dllm.masking import mask_answers, with_level_token
from nara_diffusion.dllm.models.backbone import Backbone
from nara_diffusion.dreambooth.cache import PromptCache
from nara_diffusion.dreambooth.dataset import collate_samples
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser, adapt, text_config
from nara_diffusion.dreambooth.image_arguments import run_family
from nara_diffusion.noise.denoisers import time_layers
from nara_diffusion.noise.level import MASKED_SHARE, core_holders
from nara_diffusion.training.adapters import adapter_config, add_adapter
from nara_diffusion.training.optimization import is_core_parameter

from .trials import CHEAP, CheckTask, Loss, published
from .verdict import check_training


def check_text(tuning: Any) -> dict[str, Any]:
    """What check.json holds of a `dllm.train.FineTuning`, whose backbone has no adapter yet."""
    args, objective, device = published(tuning.args), tuning.objective, tuning.run.accelerator.device
    config: Any = adapter_config(args, noise_convention=MASKED_SHARE)
    model = add_adapter(tuning.backbone, config).to(device).train()
    mask, limit = Backbone(model).mask_token_id(), Backbone(model).position_limit
    digits = digit_tokens(tuning.tokenizer)

    def loss_of(rows: Any, is_told: bool) -> Loss:
        stream = GlobalBatchStream(rows, args.seed, objective["group_size"])

        def loss(positions: Sequence[int]) -> Any:
            parts = tuning.collator([stream[position] for position in positions]).items()
            batch = mask_answers(**{name: part.to(device) for name, part in parts}, mask_token_id=mask, **objective)
            return batch_loss(model, with_level_token(batch, digits) if is_told else batch)

        return loss

    def losses(is_told: bool) -> tuple[Loss, Loss]:
        return loss_of(tuning.train_rows, is_told), loss_of(tuning.validation_rows, is_told)

    has_token = len(set(digits)) == 10 and (limit is None or tuning.padded < limit)
    if has_token:
        add_cheap(model, config)
    told = losses(True) if has_token else None
    return check_training(CheckTask(model, config, args, *losses(False), objective["group_size"], told), tuning.run)


def check_images(tuning: Any) -> dict[str, Any]:
    """What check.json holds of a `dreambooth.train.FineTuning`, whose pipeline has no adapter yet."""
    args, pipe, step = published(tuning.args), tuning.pipe, tuning.step
    config: Any = adapter_config(args, noise_convention=step.objective.source.convention)
    family = run_family(args, pipe)
    model = AdaptedDenoiser(pipe, config, gradient_checkpointing=args.gradient_checkpointing, family=family)
    if time := time_layers(model.denoiser):
        add_cheap(model, config, time)
    own = replace(step, model=model.train(), prompts=step.prompts or PromptCache(pipe, family))

    def loss_of(images: Any) -> Loss:
        return lambda positions: own(collate_samples([{"samples": images.samples_at(p)[:1]} for p in positions]))

    losses = loss_of(tuning.dataset), loss_of(tuning.measured_on)
    return check_training(CheckTask(model, config, args, *losses, step.group_size), tuning.run)


def add_cheap(model: nn.Module, config: Any, further: Sequence[str] = ()) -> None:
    """Add to a model with the NaRA of `config` the LoRA `CHEAP` of its layers and of linear layers `further`, of the
    rank at which it has NaRA's number of parameters, or nearly so."""
    root = core_holders(model)[0].root
    modules = dict(root.named_modules())
    counts = {name: each.numel() for name, each in root.named_parameters() if each.requires_grad}
    of_a_rank = sum(count for name, count in counts.items() if not is_core_parameter(name)) / config.r
    of_a_rank += sum(modules[name].in_features + modules[name].out_features for name in further)
    rank = max(1, round(sum(counts.values()) / of_a_rank))
    layers = [*(name for name, each in modules.items() if isinstance(each, LoraLayer)), *further]
    options = {"r": rank, "lora_alpha": config.lora_alpha * rank / config.r}
    options["target_modules"] = "|".join(map(re.escape, layers))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        adapt(root, replace(text_config(config), **options), CHEAP)
