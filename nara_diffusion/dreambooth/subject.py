"""The task of teaching a model a subject from a few images: data, base model, loss, evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from peft import PeftConfig

from nara_diffusion.training.adapters import adapter_config, check_target_modules, start_facts
from nara_diffusion.training.arguments import schedule_of
from nara_diffusion.training.run import Run
from nara_diffusion.utils.wording import counted

from .dataset import DreamBoothDataset, collate_samples
from .encoders import load_encoders
from .families import Family
from .fidelity import Evaluation, Measurement, Task
from .image_arguments import DreamBoothArguments, folder_arguments, run_family
from .image_records import ImageRecord, class_records, trained_on, with_masks
from .image_report import best_by_both, figures, forgetting, subject_card
from .pipelines import load_base, sharing_pipeline, training_sizes
from .placement import place_denoisers, take_turns
from .samples import SampleSettings, generate_class_images, sample_call
from .source_images import records_from_folder
from .training_step import TrainingStep, ValidationLoss, training_step

FIGURES = {
    "similarity": "similarity to the subject",
    "text_alignment": "alignment with the prompt",
    "validation_loss": "validation loss",
}
FIGURES_OF_PAIRS = {"similarity": "similarity to the target", "validation_loss": "validation loss"}


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
    trained_on: str  # the images, in words
    prompts: Sequence[str]  # of samples


def load_subject(args: DreamBoothArguments, run: Run) -> Subject:
    """Load images, base model and loss.

    Raises:
        ValueError: an argument doesn't fit the images or the model.
    """
    family = run_family(args)  # before the model is loaded
    folders = folder_arguments(args)
    images = [
        read_images(
            folder,
            family,
            str(folder.instance_data_dir),
            folder.source_data_dir,
            progress=run.is_main,
        )
        for folder in folders
    ]
    held_out: list[ImageRecord] = []
    if args.validation_data_dir:
        place, source = args.validation_data_dir, args.validation_source_dir
        held_out = read_images(folders[0], family, place, source, progress=False)
    has_sources = {bool(image.sources) for records in (*images, held_out) for image in records}
    if len(has_sources) == 2:
        raise ValueError(
            "some folders of images have sources and others have none: give sources for all of them, or for none."
        )
    if has_sources == {True} and (
        any(folder.class_prompt for folder in folders) or args.validation_prompts
    ):
        raise ValueError(
            "samples of pairs have the pairs' captions, and class images have no sources: leave --validation_prompts "
            "and --class_prompt out."
        )
    if has_sources == {True} and args.alignment_model is not None:
        raise ValueError(
            "samples of pairs are compared with their targets, not with prompts: leave --alignment_model out."
        )
    if args.mask_floor and not any(image.mask for records in images for image in records):
        raise ValueError(
            "mask_floor is the weight outside of masks, but no image has one: add a folder `mask`, set --alpha_mask, "
            "or leave it out."
        )
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
    sizes = [training_sizes(folder, family, pipe) for folder in folders]
    check_target_modules(getattr(pipe, family.denoiser), getattr(config, "target_modules", None))
    cut: Any = {"batch_size": args.train_batch_size, "seed": args.seed}
    dataset = DreamBoothDataset(
        [],
        [],
        **cut,
        crop="center" if args.center_crop else "random",
        flip=args.random_flip,
        caption_dropout=args.caption_dropout,
    )
    digests, described = [], []
    for folder, records, buckets in zip(folders, images, sizes, strict=True):
        class_images: list[ImageRecord] = []
        if folder.class_prompt is not None:
            class_images = _class_images(folder, run, pipe, family)
        dataset.add(records, buckets, class_images, folder.repeats)
        digests += digested([*records, *class_images])
        if args.dataset_config is not None:  # flags are compared by themselves
            digests.append(f"{folder.repeats} {buckets} {len(class_images)}")
        place, prompt = str(folder.instance_data_dir), folder.instance_prompt
        described.append(trained_on(records, place, prompt, class_images, folder.repeats))
    run.record_data_digest("training data", digests)
    if run.is_main:
        dataset.log_sizes()
    measured_on = DreamBoothDataset(held_out, sizes[0], **cut) if held_out else dataset
    captions = [records[0].prompt for records in images]  # one of each folder comes first
    captions += [record.prompt for record in dataset.instances]
    return Subject(
        args,
        run,
        encoders,
        pipe,
        family,
        step,
        config,
        dataset,
        measured_on,
        trained_on="; ".join(described),
        prompts=args.prompts or list(dict.fromkeys(captions))[:4],
    )


def read_images(
    args: DreamBoothArguments,
    family: Family,
    folder: str,
    source_folder: str | None,
    *,
    progress: bool,
) -> list[ImageRecord]:
    """Return the images of a folder, with captions and masks, and with sources for an edit model.

    Raises:
        ValueError: see `records_from_folder`, or there are no sources and the family needs them.
    """
    records = records_from_folder(
        folder,
        source_folder=source_folder,
        most=family.most_sources,
        prompt=args.instance_prompt,
        caption_column=args.caption_column,
        trigger=args.trigger,
        progress=progress,
    )
    if family.needs_source and not records[0].sources:
        raise ValueError(
            f"{family.title} edits images, and those in {folder} have no sources: give --source_data_dir, or the key "
            "source in metadata.jsonl."
        )
    return with_masks(records, folder, from_alpha=args.alpha_mask)


def digested(records: Sequence[ImageRecord]) -> list[str]:
    """Return everything that a sample depends on, for the digest of the data."""
    texts = []
    for record in records:
        texts += [record.key, record.prompt, *(source.key for source in record.sources)]
        if record.mask is not None:
            texts.append(record.mask.key)
    return texts


def _class_images(
    args: DreamBoothArguments, run: Run, pipe: DiffusionPipeline, family: Family
) -> list[ImageRecord]:
    """Return the images of prior preservation, after making missing ones."""
    folder, prompt = str(args.class_data_dir), str(args.class_prompt)
    device = run.accelerator.device

    def load() -> DiffusionPipeline:
        sampling = sharing_pipeline(pipe, run.dtype)
        if family.boundary is None or device.type == "cpu":
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
            subject.prompts,
            args.num_validation_images,
            args.seed,
            args.sample_batch_size,
            sample_call(args, subject.family, size),
        ),
        ValidationLoss(
            replace(subject.step, objective=subject.step.objective.unweighted),
            subject.measured_on.plain_samples(),
            subject.family,
            args.curve_points,
            args.train_batch_size,
        ),
        [record.load() for record in instances],
        **subject.encoders,
    )
    titles, noun = FIGURES, "image"
    if dataset.has_sources:
        evaluation = replace(evaluation, **of_pairs(subject, evaluation.settings))
        titles, noun = FIGURES_OF_PAIRS, "pair"
    loss_data = f"on the training {noun}s"
    if subject.measured_on is not dataset:
        loss_data = f"on {counted(len(subject.measured_on.instances), noun)} held out"
    sizes = [
        f"{counted(number, 'image')} at {height} x {width}"
        for (height, width), number in dataset.buckets.items()
    ]
    data = subject.trained_on
    if dataset.has_sources:
        data += ", each made from its source"
    return Task(
        subject.pipe,
        subject.family,
        subject.config,
        subject.step,
        dataset,
        collate_samples,
        len(dataset.epoch),
        evaluation,
        facts={
            **start_facts(args),
            "trained on": data,
            "sizes (height x width)": f"{', '.join(sizes)}; samples at {size[0]} x {size[1]}",
            "validation loss": loss_data,
        },
        report=partial(_report, evaluation, data, titles),
    )


def of_pairs(subject: Subject, settings: SampleSettings) -> dict[str, Any]:
    """Return the fields of an `Evaluation` that edits up to four pairs, held-out ones if there are any."""
    samples = subject.measured_on.plain_samples()[:4]
    sources, targets, by_prompt = [], [], []
    for sample in samples:
        images, (height, width) = sample.source_images(), sample.target
        sources.append(Flux2ImageProcessor.concatenate_images(images))
        targets += [sample.cut_image()] * settings.images_per_prompt
        image = images if len(images) > 1 else images[0]
        by_prompt.append({"image": image, "height": height, "width": width})
    prompts = [sample.prompt for sample in samples]
    return {
        "settings": replace(settings, prompts=prompts, by_prompt=by_prompt),
        "sources": sources,
        "references": targets,
        "alignment": None,
    }


def place_models(subject: Subject, sampling: DiffusionPipeline) -> None:
    """Encode all prompts, then put the denoiser on the device, or the first that runs of two."""
    args, family, device = subject.args, subject.family, subject.run.accelerator.device
    staying = family.text_encoders if args.train_text_encoder else ()
    for pipe in (subject.pipe, sampling):
        take_turns(pipe, family, device, staying, is_tight=bool(args.bits or args.block_swap))
    if subject.step.prompts is not None:
        dropped = [""] if args.caption_dropout else []
        samples = subject.dataset.plain_samples()
        if args.random_flip:
            samples += [replace(sample, flip=True) for sample in samples]
        for sample in samples + subject.measured_on.plain_samples():
            subject.step.prompts.fill([*dropped, sample.prompt], sample)
        subject.step.prompts.fill(image.prompt for image in subject.dataset.class_images)
    place_denoisers((subject.pipe, sampling), family, args.block_swap, device)


def _report(
    evaluation: Evaluation,
    data: str,
    titles: Mapping[str, str],
    before: Measurement,
    after: Measurement,
) -> dict[str, Any]:
    return {
        "names": (*titles, "curve"),
        "figures": figures(before, after, titles),
        "warnings": [*forgetting(before, after), *best_by_both(evaluation.trend())],
        "describe": partial(subject_card, evaluation, after, data),
    }
