"""Teaches an image model a subject from a few images, with NaRA or another adapter, and shows what that brought.

Stable Diffusion 1, 2, XL and 3, FLUX.1, FLUX.2, Z-Image, Qwen-Image and Wan (one frame): the model_index.json of the
model says which it is, and that sets the defaults (resolution, guidance, adapted modules); docs/dreambooth.md has the
table.

The shipped model, a small rectified flow of SD3's classes, and images, offline, on CPU, in minutes:
    accelerate launch train_scripts/dreambooth.py
Your own five images, on one GPU:
    accelerate launch train_scripts/dreambooth.py --pretrained_model_name_or_path MODEL --mixed_precision bf16 \\
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir sks-dog
With a file of settings for the model from train_scripts/configs; flags win over it:
    accelerate launch train_scripts/dreambooth.py --config train_scripts/configs/sdxl_dreambooth.yaml \\
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir sks-dog

With --adapter lora, dora, …, full the same is done by another method; --help lists them. --init_adapter starts from
a LoRA or NaRA. --min_noise_level and --max_noise_level train a part of the noise levels (docs/strength.md).

Written to the output folder: pytorch_nara_weights.safetensors (for pipe.load_nara_weights; the files of other methods
stand in nara_diffusion/dreambooth/adapter_files.py), README.md (the model card, which says how to load them),
samples.png with samples before and after, the samples themselves, noise_level_curve.png, results.json, metrics.jsonl,
config.yaml, validation/step-N.png, and checkpoint-N folders to resume from.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from nara_diffusion.check.check_tasks import image_task
from nara_diffusion.check.verdict_report import check_training
from nara_diffusion.dreambooth import collate_samples
from nara_diffusion.dreambooth.adapter_files import read_average, read_checkpoint, write_adapter, write_checkpoint
from nara_diffusion.dreambooth.conversion import converted_scheduler
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser
from nara_diffusion.dreambooth.evaluation.comparison import (
    Evaluation,
    Evaluator,
    Validation,
    ValidationLoss,
    compare,
    refuse_sharding,
    report_better_identity,
)
from nara_diffusion.dreambooth.evaluation.image_report import results_table, window_note, write_run_report
from nara_diffusion.dreambooth.evaluation.samples import sample_settings
from nara_diffusion.dreambooth.families.flows import SD3
from nara_diffusion.dreambooth.families.pipelines import folders_of, load_pipeline, sharing_pipeline
from nara_diffusion.dreambooth.families.table import family_of_model
from nara_diffusion.dreambooth.setup import (
    load_class_images,
    load_images,
    record_texts,
    run_family,
    training_buckets,
    training_data,
    training_step,
)
from nara_diffusion.loaders.schedulers import scheduler_fields
from nara_diffusion.noise.prediction import prediction_by
from nara_diffusion.training.adapters import adapter_config, check_target_modules, title_of, without_unread
from nara_diffusion.training.arguments import schedule_of, window_of
from nara_diffusion.training.checkpoints import save_adapter
from nara_diffusion.training.command import ASSETS, run_command, shipped
from nara_diffusion.training.init_adapter import start_from
from nara_diffusion.training.loop import train
from nara_diffusion.training.optimization import build_optimizer, build_scheduler
from nara_diffusion.training.report import publish, window_facts
from nara_diffusion.training.run import Run, start_run
from nara_diffusion.training.stream import count_steps, stream_loader

from .image_arguments import UNET_TARGETS, DreamBoothArguments

logger = logging.getLogger(__name__)

# What a run does where no images are named, and where no model is.
SHIPPED_DATA: dict[str, Any] = {
    "instance_data_dir": str(ASSETS / "subject"),
    "instance_prompt": "a photo of sks toy",
    "validation_prompts": [
        "a photo of sks toy",
        "a photo of sks toy on the beach",
        "a photo of sks toy in the snow",
        "a photo of sks toy in the city",
    ],
    "identifier": ["sks"],
}
SHIPPED_RUN: dict[str, Any] = {
    "pretrained_model_name_or_path": str(ASSETS / "sd-tiny-flow"),
    "similarity_model": str(ASSETS / "clip-tiny"),
    "alignment_model": str(ASSETS / "clip-tiny"),
    "resolution": 64,
    "max_sequence_length": 0,
    "weighting_scheme": "logit_normal",
    "rank": 16,
    "target_modules": [*SD3.targets, "ff.net.0.proj", "ff.net.2"],
    "train_batch_size": 5,
    "max_train_steps": 500,
    "learning_rate": 2e-3,
    "core_learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "stratified_timesteps": True,
    "num_inference_steps": 25,
    "guidance_scale": 2.5,
    "sample_batch_size": 8,
    "validation_steps": 250,
    "checkpointing_steps": 250,
}

# The same of dreambooth_sdxl.py.
SHIPPED_SDXL: dict[str, Any] = {
    "pretrained_model_name_or_path": str(ASSETS / "sdxl-tiny"),
    "similarity_model": str(ASSETS / "clip-tiny"),
    "alignment_model": str(ASSETS / "clip-tiny"),
    "resolution": 64,
    "rank": 16,
    "target_modules": [*UNET_TARGETS, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2"],
    "train_batch_size": 5,
    "max_train_steps": 700,
    "learning_rate": 2e-3,
    "core_learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "stratified_timesteps": True,
    "num_inference_steps": 20,
    "guidance_scale": 2.5,
    "sample_batch_size": 8,
    "validation_steps": 350,
    "checkpointing_steps": 350,
}


def shipped_run(given: Mapping[str, Any], values: Mapping[str, Any] = SHIPPED_RUN) -> dict[str, Any]:
    """The arguments of the shipped run, or what suits the family of the model that was `given`."""
    if "pretrained_model_name_or_path" in given:
        return family_defaults(given)
    if {"instance_data_dir", "dataset_name"} & given.keys():
        logger.info(
            "no model was named: your images teach %s, a toy of %d pixels; for SDXL at 1024 add "
            "--config train_scripts/configs/sdxl_dreambooth.yaml, or with settings of your own "
            "--pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0",
            values["pretrained_model_name_or_path"],
            values["resolution"],
        )
        return without_unread(shipped(values), given)
    return without_unread(shipped({**values, **SHIPPED_DATA}), given)


def family_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that suit the family of the model that was `given`, in place of the script's own defaults."""
    name = given["pretrained_model_name_or_path"]
    if not name:
        return {}  # which the arguments refuse
    family = family_of_model(name, revision=given.get("model_options", {}).get("revision"))
    return {"target_modules": list(family.targets), **family.defaults}


def main(args: DreamBoothArguments) -> dict[str, Any]:
    """Trains, measures before and after, saves; returns what results.json holds."""
    with start_run(args, "dreambooth", write_checkpoint) as run:
        return fine_tune(args, run)


def fine_tune(args: DreamBoothArguments, run: Run) -> dict[str, Any]:
    """The run from its data to its report."""
    started = time.perf_counter()
    refuse_sharding(run)
    device, show = run.accelerator.device, run.is_main
    family = run_family(args)

    # Data
    instances, held_out_images = load_images(args, show)
    run.record_data_digest("validation data", record_texts(held_out_images))
    evaluator = Evaluator.of_run(args, [record.load() for record in instances], device)
    load = partial(
        load_pipeline,
        args.pretrained_model_name_or_path,
        vae_name=args.pretrained_vae_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
    )

    # Model
    pipe = load(dtype=run.weights_dtype, vae_dtype=torch.float32)
    run.record_base_digests(folders_of(args, pipe), args.variant)
    family = run_family(args, pipe)
    target = converted_scheduler(pipe.scheduler, args.prediction_type, args.rescale_betas_zero_snr)
    converted = None if target is pipe.scheduler else target
    step = training_step(args, pipe, family, target, device, run.global_batch)
    config = adapter_config(
        args,
        noise_convention=step.objective.source.convention,
        scheduler=None if converted is None else scheduler_fields(converted),
        strength=schedule_of(args),
    )
    # what shows only with the model at hand is refused before hours go into class images
    training_buckets(args, pipe)
    check_target_modules(step.model, getattr(config, "target_modules", None))
    # before `pipe` takes the device's memory; a check leaves them out
    class_images = [] if args.check else load_class_images(args, run.accelerator, run.dtype, load, family)
    run.record_data_digest("training data", record_texts([*instances, *class_images]))
    pipe.to(device)
    dataset = training_data(args, instances, class_images, pipe)
    steps = count_steps(len(instances), run.global_batch, args.max_train_steps, args.num_train_epochs)
    batches = run.batches(steps)
    measured_on = training_data(args, held_out_images, [], pipe) if held_out_images else dataset
    if args.check:
        results, shown = check_training(image_task(pipe, args, step, dataset, measured_on), args, run)
        sys.stdout.write(f"{shown}\n")
        return results
    samples = measured_on.plain_samples()
    if args.cache_latents:
        drawn = dataset.distinct_samples(range(batches["first"], batches["stop"]))
        step.latents.fill([*drawn, *samples], progress=show)
    held_out = ValidationLoss(
        step.objective.unweighted,
        step.latents,
        samples,
        args.seed,
        args.curve_points,
        args.train_batch_size,
        window_of(args),
        family,
    )
    # the base's weights are shared, unless they are trained
    if config is None:
        sampler = load(dtype=run.dtype, vae_dtype=run.dtype).to(device)
    else:
        sampler = sharing_pipeline(pipe, run.dtype)
    model = AdaptedDenoiser(
        pipe,
        config,
        train_text_encoder=args.train_text_encoder,
        gradient_checkpointing=args.gradient_checkpointing,
        scheduler=converted,
        family=family,
    )
    if run.checkpoint is not None:
        read_checkpoint(model, run.checkpoint)
    elif args.init_adapter is not None:
        start_from(model.components, args.init_adapter, pipe, prediction=prediction_by(converted))

    # Train
    optimizer = build_optimizer(model, args, fused=run.fuses_optimizer)
    scheduler = build_scheduler(optimizer, args, steps)
    loader = stream_loader(dataset, collate_samples, **batches)
    denoiser, optimizer, scheduler, loader = run.accelerator.prepare(model, optimizer, scheduler, loader)
    if args.use_ema:
        model.start_average()
        if run.checkpoint is not None:
            read_average(model, run.checkpoint)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts = {
        "base": f"{args.pretrained_model_name_or_path} at {args.resolution} pixels",
        "adapter": title_of(args),
        "optimizer steps": f"{steps} of {run.global_batch} samples, from {len(instances)} images",
        "trainable parameters": f"{trainable:,}",
        "hardware": run.hardware,
        **window_facts(args),
    }
    run.open(facts)
    measured = "held-out loss" if held_out_images else "loss on the training images"
    settings = sample_settings(args, [record.prompt for record in instances], family)
    evaluation = Evaluation(run.accelerator, sampler, settings, held_out, evaluator)
    identity = None if converted is None else evaluation.identity_loss(measured)
    if identity is not None:
        facts["base read by the identity"] = f"{measured} {identity:.3f}, without training"
    validate = Validation(run, denoiser, evaluation)
    loss = replace(step, model=denoiser)
    train(run, denoiser, optimizer, scheduler, loader, steps, loss, validate, on_step=model.update_average)

    # Save
    save_adapter(run.accelerator, denoiser, run.folder, write_adapter)
    before = evaluation.measure(None, "before")
    after = evaluation.measure(run.folder, "after")
    results = {"seconds": round(time.perf_counter() - started, 1), "n": len(after.images), **compare(before, after)}
    results |= {"adapter": args.adapter, "trainable_parameters": trainable}
    results |= {"base_model": args.pretrained_model_name_or_path, "resolution": args.resolution}
    if identity is not None:
        results["identity_loss"] = identity
        report_better_identity(identity, after)
    if run.is_main:
        facts |= {"time": f"{results['seconds']:.0f} s, evaluation included"}
        references = evaluator.references
        load_from = run.hub_id or str(run.folder)
        write_run_report(run.folder, args, facts, settings, before, after, references, load_from, pipe, converted)
        publish(run, results, results_table(before, after), window_note(args, family))
    return results


if __name__ == "__main__":
    run_command(main, DreamBoothArguments, __doc__, shipped_run)
