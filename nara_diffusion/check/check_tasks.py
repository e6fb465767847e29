"""Estimate before a training whether an adapter that knows the noise level λ is likely to beat LoRA.

The check takes minutes on a small model:

    nara-check stabilityai/stable-diffusion-xl-base-1.0 dog --instance_prompt "a photo of sks dog" --learning_rate 1e-3
    nara-check GSAI-ML/LLaDA-8B-Base train.jsonl --max_length 256 --learning_rate 1e-3

MODEL is an image model that train_scripts/dreambooth.py can train, or a masked-diffusion language model: a folder, or a
repository on the Hub. DATA is a folder of images, or a JSON or JSON Lines file with records of instruction and output.
Further flags are those of that train script, whose --check this is, with defaults for short trainings of rank 4.

It repeats short trainings of LoRA, of NaRA, of NaRA that reads the same λ for every sample, and of a cheaper way to
give the model λ. Their held-out losses say whether λ is likely to help, and in which form. docs/check.md explains it.

Losses of texts are measured on the validation data, losses of images on --validation_data_dir. Without that folder one
picture of four or more is held out. With fewer, the training pictures are measured under other noise, and layers aren't
compared. Prior preservation is left out, and so are adapters of text encoders, since they don't depend on λ.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from nara_diffusion.dllm import train as dllm_train
from nara_diffusion.dllm.batches import GlobalBatchStream
from nara_diffusion.dllm.loss import batch_loss
from nara_diffusion.dllm.masking import mask_answers, with_level_token
from nara_diffusion.dllm.models.backbone import Backbone
from nara_diffusion.dllm.text_arguments import Arguments
from nara_diffusion.dllm.tokenizer import digit_tokens
from nara_diffusion.dreambooth import denoiser
from nara_diffusion.dreambooth import train as dreambooth_train
from nara_diffusion.dreambooth.caches import PromptCache
from nara_diffusion.dreambooth.dataset import collate_samples
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser, adapt, text_config
from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments, run_family
from nara_diffusion.dreambooth.pipelines import family_defaults
from nara_diffusion.noise.denoisers import time_layers
from nara_diffusion.noise.level import core_holders
from nara_diffusion.noise.sources import MASKED_SHARE
from nara_diffusion.training import adapter_weights
from nara_diffusion.training.adapters import adapter_config, add_adapter
from nara_diffusion.training.command import parse_arguments
from nara_diffusion.training.optimization import is_core_parameter
from nara_diffusion.training.run import start_run

from .trials import CHEAP, HELD_OUT, NO_CHEAP, CheckTask, Loss, published
from .verdict import check_training

SHORT = {
    "rank": 4,
    "train_batch_size": 5,
    "learning_rate": 1e-2,
    "output_dir": "outputs/check",
    "check": True,
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command `nara-check`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    words = list(sys.argv[1:] if argv is None else argv)
    places = list(takewhile(lambda word: not word.startswith("-"), words))
    try:
        if {"-h", "--help"} & set(words) and not places:
            sys.stdout.write(f"{__doc__}\n")
        elif len(places) != 2:
            raise ValueError(
                f"nara-check takes MODEL and DATA before its flags, got {len(places)}; see --help."
            )
        else:
            check(places[0], places[1], words[2:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def check(model: str, data: str, flags: Sequence[str]) -> dict[str, Any]:
    """Check the training of `model` on `data`, and return the content of check.json.

    Raises:
        ValueError: `data` is neither a file nor a folder.
    """
    own: dict[str, Any] = {**SHORT, "pretrained_model_name_or_path": model}
    arguments: type[Arguments] | type[DreamBoothArguments]
    if Path(data).is_file():
        arguments = Arguments
        own |= {"train_file": data, "target_modules": ["all-linear"]}
    elif Path(data).is_dir():
        arguments = DreamBoothArguments
        images = {"instance_data_dir": data, "instance_prompt": "a photo"}
        own = {**images, **family_defaults(own), **own}
    else:
        raise ValueError(
            f"DATA {data} doesn't exist: name a folder of images, or a file of records."
        )

    def defaults(given: Mapping[str, Any]) -> dict[str, Any]:
        return own | {"core_learning_rate": given.get("learning_rate", own["learning_rate"]) / 4}

    return check_run(parse_arguments(arguments, flags, description=__doc__, defaults=defaults))


def check_run(args: Arguments | DreamBoothArguments) -> dict[str, Any]:
    """Check the training that a train script's arguments describe. Return the content of check.json."""
    if isinstance(args, DreamBoothArguments):
        with start_run(args, "dreambooth", denoiser.write_checkpoint) as run:
            return check_images(dreambooth_train.FineTuning(args, run))
    with start_run(args, "dllm", adapter_weights.write_checkpoint) as run:
        return check_text(dllm_train.FineTuning(args, run))


def check_text(tuning: dllm_train.FineTuning) -> dict[str, Any]:
    """Check a training on texts, whose backbone has no adapter yet. Return the content of check.json."""
    args, objective, device = (
        published(tuning.args),
        tuning.objective,
        tuning.run.accelerator.device,
    )
    config: Any = adapter_config(args, noise_convention=MASKED_SHARE)
    model = add_adapter(tuning.backbone, config).to(device).train()
    mask, limit = Backbone(model).mask_token_id(), Backbone(model).position_limit
    digits = digit_tokens(tuning.tokenizer)

    def loss_of(rows: Any, is_told: bool) -> Loss:
        stream = GlobalBatchStream(rows, args.seed, objective["group_size"])

        def loss(positions: Sequence[int]) -> Any:
            parts = tuning.collator([stream[position] for position in positions]).items()
            batch = mask_answers(
                **{name: part.to(device) for name, part in parts}, mask_token_id=mask, **objective
            )
            return batch_loss(model, with_level_token(batch, digits) if is_told else batch)

        return loss

    def losses(is_told: bool) -> tuple[Loss, Loss]:
        return loss_of(tuning.train_rows, is_told), loss_of(tuning.validation_rows, is_told)

    has_token = len(set(digits)) == 10 and (limit is None or tuning.padded < limit)
    if has_token:
        add_cheap(model, config)
    told = losses(True) if has_token else None
    return check_training(
        CheckTask(model, config, args, *losses(False), objective["group_size"], told), tuning.run
    )


def check_images(tuning: dreambooth_train.FineTuning) -> dict[str, Any]:
    """Check a training on images, whose pipeline has no adapter yet. Return the content of check.json."""
    args, pipe, step = published(tuning.args), tuning.pipe, tuning.step
    config: Any = adapter_config(args, noise_convention=step.objective.source.convention)
    family = run_family(args, pipe)
    model = AdaptedDenoiser(
        pipe, config, gradient_checkpointing=args.gradient_checkpointing, family=family
    )
    is_unseen, no_cheap = args.validation_data_dir is not None, NO_CHEAP
    if not is_unseen:
        no_cheap = "pictures that no training saw are few, so give more by --validation_data_dir to compare layers"
    elif time := time_layers(model.denoiser):
        add_cheap(model, config, time)
    own = replace(step, model=model.train(), prompts=step.prompts or PromptCache(pipe, family))

    def loss_of(images: Any) -> Loss:
        return lambda positions: own(
            collate_samples([{"samples": images.samples_at(p)[:1]} for p in positions])
        )

    losses = loss_of(tuning.dataset), loss_of(tuning.measured_on)
    measured = HELD_OUT if is_unseen else "Losses on a picture held out"
    if tuning.measured_on is tuning.dataset:
        measured = "Losses on the training pictures under other noise"
    task = CheckTask(
        model, config, args, *losses, step.group_size, measured=measured, no_cheap=no_cheap
    )
    return check_training(task, tuning.run)


def add_cheap(model: nn.Module, config: Any, further: Sequence[str] = ()) -> None:
    """Add to a model with the NaRA of `config` the LoRA `CHEAP` of its layers and of linear layers `further`, of the
    rank at which it has NaRA's number of parameters, or nearly so."""
    root = core_holders(model)[0].root
    modules = dict(root.named_modules())
    counts = {name: each.numel() for name, each in root.named_parameters() if each.requires_grad}
    of_a_rank = (
        sum(count for name, count in counts.items() if not is_core_parameter(name)) / config.r
    )
    of_a_rank += sum(modules[name].in_features + modules[name].out_features for name in further)
    rank = max(1, round(sum(counts.values()) / of_a_rank))
    layers = [*(name for name, each in modules.items() if isinstance(each, LoraLayer)), *further]
    options = {"r": rank, "lora_alpha": config.lora_alpha * rank / config.r}
    options["target_modules"] = "|".join(map(re.escape, layers))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        adapt(root, replace(text_config(config), **options), CHEAP)
