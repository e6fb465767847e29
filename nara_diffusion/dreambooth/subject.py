"""The task of teaching a model a subject from a few images: data, base model, loss, evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from peft import PeftConfig

from nara_diffusion.training.adapters import adapter_config, check_target_modules, start_facts
from nara_diffusion.training.arguments import schedule_of
from nara_diffusion.training.run import Run
from nara_diffusion.utils.wording import counted

from .block_swap import BlockSwap
from .class_images import generate_class_images
from .cut_prompts import prompt_sources, warn_of_cut_prompts
from .dataset import DreamBoothDataset, collate_samples
from .encoders import load_encoders
from .expert_swap import ExpertSwap
from .families import Family
from .fidelity import Evaluation, Measurement
from .image_arguments import DreamBoothArguments, run_family
from .image_records import ImageRecord, class_records, records_from_folder, trained_on
from .image_report import figures, forgetting, subject_card
from .pipelines import load_base, sharing_pipeline, training_sizes
from .placement import take_turns
from .reconstruction import reconstruct
from .samples import SampleSettings, sample_call
from .task import Task
from .training_step import TrainingStep, training_step
from .validation_loss import ValidationLoss

FIGURES = {
    "similarity": "similarity to the subject",
    "similarity_as_shown": "similarity to it as the autoencoder shows it",
    "text_alignment": "alignment with the prompt",
    "validation_loss": "validation loss",
}


@dataclass(frozen=True)
class Subject:
    """The images, the base model without an adapter, and the loss of a run."""

    args: DreamBoothArguments
    run: Run
    encoders: dict[str, Any]  # those of an `Evaluation`
    pipe: DiffusionPipeline
    family: Family
    step: TrainingStep
    config: PeftConfig
    dataset: DreamBoothDataset
    measured_on: DreamBoothDataset  # of the validation loss


def load_subject(args: DreamBoothArguments, run: Run) -> Subject:
    """Load images, base model and loss.

    Raises:
        ValueError: an argument doesn't fit the images or the model.
    """
    run_family(args)  # before the model is loaded
    captions: Any = {"prompt": args.instance_prompt, "caption_column": args.caption_column}
    folder = str(args.instance_data_dir)
    instances = records_from_folder(folder, progress=run.is_main, **captions)
    held_out: list[ImageRecord] = []
    if args.validation_data_dir:
        held_out = records_from_folder(args.validation_data_dir, **captions)
    run.record_data_digest("validation data", digested(held_out))
    device = run.accelerator.device
    encoders = load_encoders(args, device)

    pipe = load_base(args, run)
    family = run_family(args, pipe)
    forward_size = args.train_batch_size * run.accelerator.num_processes
    step = training_step(args, pipe, family, device, run.global_batch, forward_size)
    config: Any = adapter_config(
        args,
        noise_convention=step.objective.source.convention,
        noise_level_per="sample",
        strength=schedule_of(args),
    )
    # errors that need the model come before hours of making class images
    sizes = training_sizes(args, family, pipe)
    check_target_modules(step.model, getattr(config, "target_modules", None))
    class_images: list[ImageRecord] = []
    if args.class_prompt is not None:
        class_images = _class_images(args, run, pipe, family)
    run.record_data_digest("training data", digested([*instances, *class_images]))

    cut: Any = {"batch_size": args.train_batch_size, "seed": args.seed}
    dataset = DreamBoothDataset(
        instances,
        sizes,
        **cut,
        class_images=class_images,
        crop="center" if args.center_crop else "random",
        flip=args.random_flip,
        caption_dropout=args.caption_dropout,
    )
    if run.is_main:
        dataset.warn_of_sizes()
        warn_of_cut_prompts(pipe, prompt_sources(args, [*instances, *held_out]))
    measured_on = DreamBoothDataset(held_out, sizes, **cut) if held_out else dataset
    return Subject(args, run, encoders, pipe, family, step, config, dataset, measured_on)


def digested(records: Sequence[ImageRecord]) -> list[str]:
    """Return everything that a sample depends on, for the digest of the data."""
    return [text for record in records for text in (record.key, record.prompt)]


def _class_images(
    args: DreamBoothArguments, run: Run, pipe: DiffusionPipeline, family: Family
) -> list[ImageRecord]:
    """Return the images of prior preservation, after making missing ones."""
    folder, prompt = str(args.class_data_dir), str(args.class_prompt)
    device = run.accelerator.device

    def load() -> DiffusionPipeline:
        sampling = sharing_pipeline(pipe, run.dtype)
        if family.experts is None or device.type == "cpu":
            return sampling.to(device)
        sampling.enable_model_cpu_offload(device=device)
        return sampling

    generate_class_images(
        load,
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


def subject_task(subject: Subject) -> Task:
    """Return the task of teaching `subject`, with an evaluation of the base model's pipeline."""
    args, run, dataset = subject.args, subject.run, subject.dataset
    instances, size = dataset.instances, dataset.sample_size
    sampling = sharing_pipeline(subject.pipe, run.dtype)
    place_models(subject, sampling)
    evaluation = Evaluation(
        run,
        sampling,
        SampleSettings(
            args.prompts or list(dict.fromkeys(record.prompt for record in instances))[:4],
            args.num_validation_images,
            args.seed,
            args.sample_batch_size,
            sample_call(args, subject.family, size),
        ),
        ValidationLoss(
            subject.step.objective.unweighted,
            subject.step.latents,
            subject.measured_on.plain_samples(),
            subject.family,
            args.seed,
            args.curve_points,
            args.train_batch_size,
            subject.step.prompts,
        ),
        [record.load() for record in instances],
        **subject.encoders,
        reconstruction=reconstruct(subject.pipe.vae, dataset.plain_samples()),
    )
    loss_data = "on the training images"
    if subject.measured_on is not dataset:
        loss_data = f"on {counted(len(subject.measured_on.instances), 'image')} held out"
    sizes = []
    for (height, width), number in dataset.buckets.items():
        sizes.append(f"{counted(number, 'image')} at {height} x {width}")
    folder = str(args.instance_data_dir)
    data = trained_on(instances, folder, args.instance_prompt, dataset.class_images)
    return Task(
        subject.pipe,
        subject.family,
        subject.config,
        subject.step,
        dataset,
        collate_samples,
        len(instances),
        evaluation,
        facts={
            **start_facts(args),
            "trained on": data,
            "sizes (height x width)": f"{', '.join(sizes)}; samples at {size[0]} x {size[1]}",
            "validation loss": loss_data,
        },
        report=partial(_report, evaluation, data),
    )


def place_models(subject: Subject, sampling: DiffusionPipeline) -> None:
    """Encode all prompts, then put the denoiser on the device, or the first that runs of two."""
    args, family, device = subject.args, subject.family, subject.run.accelerator.device
    staying = family.text_encoders if args.train_text_encoder else ()
    for pipe in (subject.pipe, sampling):
        take_turns(pipe, family, device, staying, is_tight=args.is_quantised or args.block_swap > 0)
    if subject.step.prompts is not None:
        images = [*subject.dataset.instances, *subject.dataset.class_images]
        dropped = [""] if args.caption_dropout else []
        prompts = [image.prompt for image in [*images, *subject.measured_on.instances]]
        subject.step.prompts.fill(dict.fromkeys([*dropped, *prompts]))
    if family.experts is not None:
        if device.type != "cpu":
            ExpertSwap(subject.pipe, family, device).attach(sampling)
        return
    denoiser = getattr(subject.pipe, family.denoiser)
    if args.block_swap:
        swap = BlockSwap(denoiser.to("cpu"), args.block_swap, device)
        for pipe in (subject.pipe, sampling):
            swap.attach(getattr(pipe, family.denoiser))
    denoiser.to(device)


def _report(
    evaluation: Evaluation, data: str, before: Measurement, after: Measurement
) -> dict[str, Any]:
    return {
        "names": (*FIGURES, "curve"),
        "figures": figures(before, after, FIGURES),
        "warnings": forgetting(before, after),
        "describe": partial(subject_card, evaluation, after, data),
    }
