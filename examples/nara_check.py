"""Estimate before a training whether an adapter that reads the noise level λ will likely beat LoRA.

The check takes minutes on a small model:

    python examples/nara_check.py stabilityai/stable-diffusion-xl-base-1.0 dog \\
        --instance_prompt "a photo of sks dog" --learning_rate 1e-3
    python examples/nara_check.py GSAI-ML/LLaDA-8B-Base train.jsonl --max_length 256 --learning_rate 1e-3

MODEL is an image model that train_scripts/dreambooth.py can train, or a masked-diffusion language
model: a folder, or a repository on the Hub. DATA is a folder of images, or a JSON or JSON Lines
file with records of instruction and output. All other flags are those of the train script, also
--config. Their defaults are those of short trainings of rank 4.

It repeats short trainings of LoRA, of NaRA, of NaRA that reads the same λ for every sample, and of
a cheaper way to give the model λ. Their held-out losses say whether λ is likely to help, and in
what form. examples/check/README.md explains it.

The check measures losses of texts on the validation data, and losses of images on
--validation_data_dir. Without that folder it holds out one picture of four or more. With fewer, it
measures the training pictures under other noise, and doesn't compare layers. It leaves out prior
preservation and adapters of text encoders, since they don't depend on λ.

--output_dir gets check.json, and repeats.jsonl with each repeat as it finishes. If the check was
stopped, give the same command again: it continues.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from check.level_token import digit_tokens, with_level_token
from check.time_layers import time_layers
from check.trials import HELD_OUT, NO_CHEAP, CheckTask, Loss, add_cheap, nara_config, published
from check.verdict import check_training
from datasets import Dataset
from torch import nn

from nara_diffusion.dllm import train as dllm_train
from nara_diffusion.dllm.batches import GlobalBatchStream
from nara_diffusion.dllm.kinds import kind_of
from nara_diffusion.dllm.kinds.text_kind import TextLoss
from nara_diffusion.dllm.loss import batch_loss
from nara_diffusion.dllm.masking import mask_answers
from nara_diffusion.dllm.models.backbone import Backbone
from nara_diffusion.dllm.text_arguments import Arguments, adapter_options
from nara_diffusion.dreambooth.caches import PromptCache
from nara_diffusion.dreambooth.dataset import DreamBoothDataset, collate_samples
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser, write_checkpoint
from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments, family_defaults, run_family
from nara_diffusion.dreambooth.pipelines import training_sizes
from nara_diffusion.dreambooth.subject import Subject, load_subject
from nara_diffusion.dreambooth.training_step import DreamBoothLoss, TrainingStep
from nara_diffusion.training import adapter_weights
from nara_diffusion.training.adapters import add_adapter
from nara_diffusion.training.arguments import method_of
from nara_diffusion.training.run import start_run
from nara_flags.parser import parse_arguments

SHORT = {"rank": 4, "train_batch_size": 5, "learning_rate": 1e-2, "output_dir": "outputs/check"}
CONFIGS = Path(__file__).parents[1] / "train_scripts" / "configs"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    words = list(sys.argv[1:] if argv is None else argv)
    places = list(takewhile(lambda word: not word.startswith("-"), words))
    try:
        if {"-h", "--help"} & set(words) and not places:
            sys.stdout.write(f"{__doc__}\n")
        elif len(places) != 2:
            raise ValueError(f"nara_check takes MODEL and DATA before its flags, got {len(places)}; see --help.")
        else:
            check(places[0], places[1], words[2:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def check(model: str, data: str, flags: Sequence[str]) -> dict[str, Any]:
    """Check the training of `model` on `data`, and return the content of check.json.

    Args:
        model: the folder or repository of the model.
        data: a folder of images, or a file of records.
        flags: the remaining command-line arguments.

    Raises:
        ValueError: `data` is neither a file nor a folder, or the check doesn't support a flag.
    """
    arguments: type[Arguments] | type[DreamBoothArguments]
    words = [f"--pretrained_model_name_or_path={model}"]
    if Path(data).is_file():
        arguments = Arguments
        words.append(f"--train_file={data}")
    elif Path(data).is_dir():
        arguments = DreamBoothArguments
        words.append(f"--instance_data_dir={data}")
    else:
        raise ValueError(f"DATA {data} doesn't exist: name a folder of images, or a file of records.")

    def defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
        rate = settings.get("learning_rate", SHORT["learning_rate"])
        rates = SHORT | {"core_learning_rate": rate / 4}
        if arguments is DreamBoothArguments:
            return {"instance_prompt": "a photo", **family_defaults(settings), **rates}
        return {"target_modules": ["all-linear"], **shipped_lengths(model), **rates}

    args = parse_arguments(arguments, [*words, *flags], defaults)
    if method_of(args).family in ("prompt", "full"):
        raise ValueError(f"the check measures low-rank adapters, got --adapter {args.adapter}: leave it out.")
    for name in ("resume_from_checkpoint", "init_adapter", "hub_model_id", "plan"):
        if getattr(args, name):
            raise ValueError(f"the check trains new adapters and uploads nothing: leave --{name} out.")
    args.resume_from_checkpoint = "latest"  # a folder with the same arguments isn't refused
    if isinstance(args, DreamBoothArguments):
        args.class_prompt = args.class_data_dir = None
        with start_run(args, "dreambooth", write_checkpoint) as run:
            subject = load_subject(args, run)
            subject.pipe.to(run.accelerator.device)
            return check_images(subject)
    with start_run(args, "dllm", adapter_weights.write_checkpoint) as run:
        return check_text(dllm_train.prepare(args, run))


def shipped_lengths(model: str) -> dict[str, Any]:
    """Return the lengths of the shipped run of `model`; none for a model without a shipped run."""
    for file in CONFIGS.glob("*_tiny.yaml"):
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        if Path(model).resolve() == (CONFIGS.parents[1] / settings["pretrained_model_name_or_path"]).resolve():
            return {name: settings[name] for name in ("gen_length", "trained_padding") if name in settings}
    return {}


# ---------------------------------------------------------------------- texts


def check_text(setup: dllm_train.Setup) -> dict[str, Any]:
    """Check a training on texts, and return the content of check.json.

    Args:
        setup: the training, with a base model that has no adapter yet.
    """
    args = published(setup.args)
    data, base = setup.data, setup.base.model
    backbone = Backbone(base)
    config = nara_config(args, **adapter_options(base, args))
    adapted = add_adapter(base, config)
    model = adapted.to(setup.run.accelerator.device).train()
    digits = digit_tokens(setup.base.tokenizer)
    limit = backbone.position_limit
    has_digits = len(set(digits)) == 10
    has_place = (limit is None or data.padded < limit) and backbone.block_length is None
    with_token = None
    if has_digits and has_place:
        add_cheap(model, config)
        with_token = (
            text_loss(setup, model, data.training.rows, digits),
            text_loss(setup, model, data.validation_rows, digits),
        )
    task = CheckTask(
        model,
        config,
        args,
        loss=text_loss(setup, model, data.training.rows),
        held_out=text_loss(setup, model, data.validation_rows),
        step_samples=setup.objective["group_size"],
        with_token=with_token,
    )
    return check_training(task, setup.run)


def text_loss(
    setup: dllm_train.Setup,
    model: nn.Module,
    rows: Dataset,
    digits: Sequence[int] | None = None,
) -> Loss:
    """Return a function that computes the loss of `model` at positions in the stream of samples.

    Args:
        digits: the tokens of 0 … 9, to append λ as a digit to each prompt. None appends nothing.
    """
    device = setup.run.accelerator.device
    backbone = Backbone(model)
    kind = kind_of(backbone)
    objective = dict(setup.objective)
    if backbone.traits.attends_by_blocks:
        objective["one_level"] = True  # the check compares samples by their λ
    stream = GlobalBatchStream(rows, setup.args.seed, setup.objective["group_size"])

    def loss(positions: Sequence[int]) -> TextLoss:
        inputs = setup.data.collator([stream[position] for position in positions])
        inputs["input_ids"] = inputs["input_ids"].to(device, non_blocking=True)
        if digits is None:
            return kind.loss(model, **inputs, **objective)
        batch = mask_answers(**inputs, mask_token_id=backbone.mask_token_id(), **objective)
        return batch_loss(model, with_level_token(batch, digits))

    return loss


# ---------------------------------------------------------------------- images


def check_images(tuning: Subject) -> dict[str, Any]:
    """Check a training on images, and return the content of check.json.

    Args:
        tuning: the training, with a pipeline that has no adapter yet.
    """
    args, pipe, step = published(tuning.args), tuning.pipe, tuning.step
    config = nara_config(args, step.objective.source.convention)
    family = run_family(args, pipe)
    model = AdaptedDenoiser(pipe, config, gradient_checkpointing=args.gradient_checkpointing, family=family)
    trained, held_out, measured = split_images(tuning)
    no_cheap = NO_CHEAP
    if args.validation_data_dir is None:
        no_cheap = "pictures that no training saw are few, so give more by --validation_data_dir to compare layers"
    elif time := time_layers(model.denoiser):
        add_cheap(model, config, time)
    prompts = step.prompts or PromptCache(pipe, family)
    step = replace(step, model=model.train(), prompts=prompts)
    task = CheckTask(
        model,
        config,
        args,
        loss=image_loss(step, trained),
        held_out=image_loss(step, held_out),
        step_samples=step.group_size,
        measured=measured,
        no_cheap=no_cheap,
    )
    return check_training(task, tuning.run)


def image_loss(step: TrainingStep, images: DreamBoothDataset) -> Loss:
    """Return a function that computes the loss of `step` at given positions in `images`."""

    def loss(positions: Sequence[int]) -> DreamBoothLoss:
        items = []
        for position in positions:
            instance = images.samples_at(position)[0]
            items.append({"samples": [instance]})
        return step(collate_samples(items))

    return loss


def split_images(tuning: Subject) -> tuple[DreamBoothDataset, DreamBoothDataset, str]:
    """Return the pictures to train on, those to measure on, and what the report calls the losses on these."""
    args, dataset = tuning.args, tuning.dataset
    if args.validation_data_dir is not None:
        return dataset, tuning.measured_on, HELD_OUT
    images = dataset.instances
    if len({image.key for image in images}) < 4:
        return dataset, dataset, "Losses on the training pictures under other noise"
    sizes = training_sizes(args, tuning.family, tuning.pipe)
    parts = []
    for part in (
        [image for image in images if image.key != images[-1].key],  # without copies of the last one
        [images[-1]],
    ):
        parts.append(
            DreamBoothDataset(
                part,
                sizes,
                batch_size=args.train_batch_size,
                seed=args.seed,
                crop=dataset.crop,
                flip=dataset.flip,
                caption_dropout=args.caption_dropout,
            )
        )
    return parts[0], parts[1], "Losses on a picture held out"


if __name__ == "__main__":
    main()
