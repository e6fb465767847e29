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
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers.training_utils import generate_aspect_ratio_buckets, parse_buckets_string

from nara_diffusion.check.check_tasks import image_task
from nara_diffusion.check.verdict import check_training
from nara_diffusion.dreambooth.adapter_files import read_average, read_checkpoint, write_adapter, write_checkpoint
from nara_diffusion.dreambooth.cache import LatentCache, PromptCache
from nara_diffusion.dreambooth.conversion import converted_scheduler
from nara_diffusion.dreambooth.data.class_images import generate_class_images
from nara_diffusion.dreambooth.data.dataset import DreamBoothDataset, collate_samples
from nara_diffusion.dreambooth.data.image_records import (
    ImageRecord,
    Size,
    class_records,
    records_from_dataset,
    records_from_folder,
)
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser
from nara_diffusion.dreambooth.draws import drawable_levels
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
from nara_diffusion.dreambooth.evaluation.samples import sample_call, sample_settings
from nara_diffusion.dreambooth.families.family import Family
from nara_diffusion.dreambooth.families.pipelines import folders_of, load_pipeline, sharing_pipeline
from nara_diffusion.dreambooth.objectives import build_objective
from nara_diffusion.dreambooth.training_step import TrainingStep
from nara_diffusion.loaders.schedulers import scheduler_fields
from nara_diffusion.noise.prediction import prediction_by
from nara_diffusion.training.adapters import adapter_config, check_target_modules, title_of
from nara_diffusion.training.arguments import schedule_of, window_of
from nara_diffusion.training.checkpoints import save_adapter
from nara_diffusion.training.command import run_command
from nara_diffusion.training.init_adapter import start_from
from nara_diffusion.training.loop import train
from nara_diffusion.training.optimization import build_optimizer, build_scheduler
from nara_diffusion.training.report import publish, window_facts
from nara_diffusion.training.run import Run, start_run
from nara_diffusion.training.stream import count_steps, stream_loader

from .image_arguments import DreamBoothArguments, run_family
from .shipped import shipped_run

logger = logging.getLogger(__name__)


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
    run.record_data_digest("validation data", digested(held_out_images))
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
    buckets = training_buckets(args, family.divisor(pipe))
    check_target_modules(step.model, getattr(config, "target_modules", None))
    # before `pipe` takes the device's memory; a check leaves them out
    class_images = [] if args.check else load_class_images(args, run, load, family)
    run.record_data_digest("training data", digested([*instances, *class_images]))
    pipe.to(device)
    samples_of = partial(
        DreamBoothDataset,
        buckets=buckets,
        batch_size=args.train_batch_size,
        seed=args.seed,
        crop="center" if args.center_crop else "random",
        crops_per_image=args.crops_per_image,
        flip=args.random_flip,
        caption_dropout=args.caption_dropout,
    )
    dataset = samples_of(instances, class_images=class_images)
    steps = count_steps(len(instances), run.global_batch, args.max_train_steps, args.num_train_epochs)
    batches = run.batches(steps)
    measured_on = samples_of(held_out_images) if held_out_images else dataset
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


def load_images(args: DreamBoothArguments, progress: bool) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """The captioned images of the subject and of `--validation_data_dir`; raises ValueError for bad ones."""
    captions: dict[str, Any] = {"prompt": args.instance_prompt, "caption_column": args.caption_column}
    if args.dataset_name is not None:
        instances = records_from_dataset(
            args.dataset_name,
            config_name=args.dataset_config_name,
            image_column=args.image_column,
            progress=progress,
            **captions,
        )
    else:
        instances = records_from_folder(str(args.instance_data_dir), progress=progress, **captions)
    if args.validation_data_dir is None:
        return instances, []
    return instances, records_from_folder(args.validation_data_dir, progress=progress, **captions)


def digested(records: Sequence[ImageRecord]) -> list[str]:
    """All that a sample depends on."""
    return [text for record in records for text in (record.key, record.prompt)]


def load_class_images(
    args: DreamBoothArguments, run: Run, load: Callable[..., Any], family: Family
) -> list[ImageRecord]:
    """The images of prior preservation, of which missing ones are generated; none without it."""
    if not args.with_prior_preservation:
        return []
    folder, prompt = str(args.class_data_dir), str(args.class_prompt)
    generate_class_images(
        lambda: load(dtype=run.dtype, vae_dtype=run.dtype).to(run.accelerator.device),
        folder,
        prompt,
        args.num_class_images,
        seed=args.seed,
        batch_size=args.sample_batch_size,
        accelerator=run.accelerator,
        progress=run.is_main,
        **sample_call(args, family),
    )
    return class_records(folder, prompt=prompt, progress=run.is_main)


def training_buckets(args: DreamBoothArguments, divisor: int) -> list[Size]:
    """The sizes to train at. Raises ValueError for one that isn't a multiple of `divisor`."""
    if args.aspect_ratio_buckets == "auto":
        return generate_aspect_ratio_buckets(args.resolution, max(divisor, min(64, args.resolution // 4)))
    sizes = [(args.resolution, args.resolution)]
    if args.aspect_ratio_buckets is not None:
        sizes = parse_buckets_string(args.aspect_ratio_buckets)
    for height, width in sizes:
        if height % divisor or width % divisor:
            raise ValueError(
                f"a training size of {height} x {width} pixels doesn't fit this model: both sides have to be multiples "
                f"of {divisor}."
            )
    return sizes


def training_step(
    args: DreamBoothArguments, pipe: Any, family: Family, scheduler: Any, device: torch.device, group_size: int
) -> TrainingStep:
    """The loss of the run, of the denoiser of `pipe`.

    Args:
        scheduler: of the model as it is trained (`converted_scheduler`).
        group_size: samples of an optimizer step.

    Raises:
        ValueError: an objective that doesn't fit the scheduler, or a window without one of its noise levels.
    """
    weights = {"snr_gamma": args.snr_gamma, "shift": args.flow_shift, "weighting_scheme": args.weighting_scheme}
    objective = build_objective(scheduler, **weights)
    density = {name: getattr(args, name) for name in ("logit_mean", "logit_std", "mode_scale")}
    prompts = None if args.train_text_encoder else PromptCache(pipe, family, folder=args.cache_folder)
    latents = LatentCache(pipe.vae, memory_mib=0)
    if args.cache_latents:
        latents = LatentCache(pipe.vae, folder=args.cache_folder)
    return TrainingStep(
        model=getattr(pipe, family.denoiser),
        objective=objective,
        latents=latents,
        prompts=prompts,
        device=device,
        seed=args.seed,
        group_size=group_size,
        stratified=args.stratified_timesteps,
        noise_offset=args.noise_offset,
        prior_loss_weight=args.prior_loss_weight,
        drawable=drawable_levels(objective.noise_levels, window_of(args), args.weighting_scheme, **density),
    )


if __name__ == "__main__":
    run_command(main, DreamBoothArguments, __doc__, shipped_run)
