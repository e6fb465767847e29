"""Teach an image model a subject from a few images: data, model, training, report.

`nara_flags.images` has the flags, and the text of `--help`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from accelerate.utils import DistributedType

from nara_diffusion.training.adapters import (
    adapter_config,
    check_target_modules,
    start_facts,
    title_of,
    window_facts,
)
from nara_diffusion.training.arguments import schedule_of
from nara_diffusion.training.checkpoints import save_adapter
from nara_diffusion.training.command import run_command
from nara_diffusion.training.init_adapter import start_from
from nara_diffusion.training.loop import prepare_training, train
from nara_diffusion.training.plan import show_plan
from nara_diffusion.training.report import finish
from nara_diffusion.training.run import Run, start_run
from nara_diffusion.utils.wording import counted
from nara_flags.images import ImageFlags
from nara_flags.parser import read_flags

from .cut_prompts import prompt_sources, warn_of_cut_prompts
from .dataset import DreamBoothDataset, collate_samples
from .denoiser import AdaptedDenoiser, read_checkpoint, write_adapter, write_checkpoint
from .distill import Distillation
from .encoders import load_encoders
from .fidelity import Evaluation, Measurement
from .image_arguments import DreamBoothArguments, run_family
from .image_plan import planned_image_step
from .image_records import ImageRecord, Size, class_records, records_from_folder, trained_on
from .image_report import describe, figures, forgetting, schedule_line
from .pipelines import (
    load_base,
    sharing_pipeline,
    shipped_run,
    training_sizes,
)
from .reconstruction import reconstruct
from .samples import SampleSettings, generate_class_images, sample_call
from .training_step import ValidationLoss, training_step

FIGURES = {
    "similarity": "similarity to the subject",
    "similarity_as_shown": "similarity to it as the autoencoder shows it",
    "text_alignment": "alignment with the prompt",
    "validation_loss": "validation loss",
}
"""{a figure in results.json: its name in the report}."""


def main(args: DreamBoothArguments) -> dict[str, Any]:
    """Train, measure before and after, save, and return the content of results.json.

    With `plan`, only print the memory and FLOPs of the run, and return these figures.
    """
    if args.plan is not None:
        return show_plan(args, planned_image_step)
    with start_run(args, "dreambooth", write_checkpoint) as run:
        tuning = FineTuning(args, run) if args.distill_to is None else Distillation(args, run)
        tuning.train()
        return tuning.report()


class FineTuning:
    """One training run.

    The constructor loads the data, the base model and the loss, and raises errors for invalid
    arguments. Then call `train` and `report`.
    """

    def __init__(self, args: DreamBoothArguments, run: Run) -> None:
        self.args, self.run = args, run
        self.before: Measurement | None = None  # with --init_adapter, measured before training
        self._refuse_sharding()
        run_family(args)  # before the model is loaded
        self.instances, held_out = self._records()
        run.record_data_digest("validation data", digested(held_out))
        self.encoders = load_encoders(args, run.accelerator.device)

        self.pipe = load_base(args, run)
        self.family = run_family(args, self.pipe)
        device = run.accelerator.device
        self.step = training_step(args, self.pipe, self.family, device, run.global_batch)
        convention = self.step.objective.source.convention
        self.config: Any = adapter_config(
            args,
            noise_convention=convention,
            noise_level_per="sample",
            strength=schedule_of(args),
        )
        # errors that need the model come before hours of making class images
        buckets = training_sizes(args, self.family, self.pipe)
        check_target_modules(self.step.model, getattr(self.config, "target_modules", None))
        class_images = self._class_images()
        run.record_data_digest("training data", digested([*self.instances, *class_images]))
        self.pipe.to(device)
        self.dataset = self._dataset(self.instances, buckets, class_images)
        self.dataset.warn_of_crops()
        if run.is_main:
            warn_of_cut_prompts(self.pipe, prompt_sources(args, [*self.instances, *held_out]))
        self.measured_on = self._dataset(held_out, buckets) if held_out else self.dataset

    def _records(self) -> tuple[list[ImageRecord], list[ImageRecord]]:
        """Return the images to train on, and those held out for validation, if any."""
        args = self.args
        captions: Any = {"prompt": args.instance_prompt, "caption_column": args.caption_column}
        folder = str(args.instance_data_dir)
        images = records_from_folder(folder, progress=self.run.is_main, **captions)
        if args.validation_data_dir:
            return images, records_from_folder(args.validation_data_dir, **captions)
        return images, []

    def _refuse_sharding(self) -> None:
        """Raise ValueError for engines that shard the model; sampling needs it whole."""
        kind = self.run.accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise ValueError(
                f"this script needs the whole model on each device, so it can't train with {kind.value}: "
                "launch it with --multi_gpu, and turn on gradient_checkpointing and mixed_precision "
                "bf16 if memory is short."
            )

    def _class_images(self) -> list[ImageRecord]:
        """Return the images of prior preservation, after making missing ones."""
        args, run = self.args, self.run
        if args.class_prompt is None:
            return []
        folder = str(args.class_data_dir)
        generate_class_images(
            lambda: sharing_pipeline(self.pipe, run.dtype).to(run.accelerator.device),
            folder,
            args.class_prompt,
            args.num_class_images,
            seed=args.seed,
            batch_size=args.sample_batch_size,
            accelerator=run.accelerator,
            progress=run.is_main,
            **sample_call(args, self.family),
        )
        return class_records(folder, prompt=args.class_prompt, progress=run.is_main)

    def _dataset(
        self,
        images: Sequence[ImageRecord],
        buckets: list[Size],
        class_images: Sequence[ImageRecord] = (),
    ) -> DreamBoothDataset:
        args = self.args
        return DreamBoothDataset(
            images,
            buckets,
            batch_size=args.train_batch_size,
            seed=args.seed,
            class_images=class_images,
            crop="center" if args.center_crop else "random",
            flip=args.random_flip,
            caption_dropout=args.caption_dropout,
        )

    def train(self) -> None:
        """Train from the start or a checkpoint to the last step, and write the adapter."""
        args, run = self.args, self.run
        steps = run.plan(len(self.instances))
        self.evaluation = self._evaluation()
        model = self._model()
        parts = prepare_training(run, model, self.dataset, collate_samples)
        denoiser = parts[0]
        self.trainable = sum(parameter.numel() for parameter in model.trained.values())
        folder, measured_on = str(args.instance_data_dir), "on the training images"
        if self.measured_on is not self.dataset:
            measured_on = f"on {counted(len(self.measured_on.instances), 'image')} held out"
        sizes = []
        for (height, width), number in self.dataset.buckets.items():
            sizes.append(f"{counted(number, 'image')} at {height} x {width}")
        height, width = self.dataset.sample_size
        self.facts = {
            "base": f"{args.pretrained_model_name_or_path} at {args.resolution} pixels",
            "adapter": title_of(args),
            **start_facts(args),
            "trained on": trained_on(
                self.instances, folder, args.instance_prompt, self.dataset.class_images
            ),
            "sizes (height x width)": f"{', '.join(sizes)}; samples at {height} x {width}",
            "validation loss": measured_on,
            "optimizer steps": f"{steps} of {counted(run.global_batch, 'sample')}",
            "trainable parameters": f"{self.trainable:,}",
            "hardware": run.hardware,
            **window_facts(args),
        }
        run.open(self.facts)
        run.restore()
        loss = replace(self.step, model=denoiser)
        validate = partial(self.evaluation.validate, denoiser)
        train(run, parts, loss, validate)
        save_adapter(run.accelerator, denoiser, run.folder, write_adapter)

    def _evaluation(self) -> Evaluation:
        """Return the evaluation of the base's pipeline, which must not have an adapter yet."""
        args, samples = self.args, self.measured_on.plain_samples()
        measured = (self.step.objective.unweighted, self.step.latents, samples, self.family)
        loss = ValidationLoss(*measured, args.seed, args.curve_points, args.train_batch_size)
        captions = dict.fromkeys(record.prompt for record in self.instances)
        prompts = args.prompts or list(captions)[:4]
        call = sample_call(args, self.family, self.dataset.sample_size)
        settings = SampleSettings(
            prompts, args.num_validation_images, args.seed, args.sample_batch_size, call
        )
        references = [record.load() for record in self.instances]
        shown = reconstruct(self.pipe.vae, self.dataset.plain_samples())
        pipe = sharing_pipeline(self.pipe, self.run.dtype)
        return Evaluation(
            self.run, pipe, settings, loss, references, **self.encoders, reconstruction=shown
        )

    def _model(self) -> AdaptedDenoiser:
        """Return the model, with the weights to continue from.

        With --init_adapter, measure the base with that adapter first.
        """
        args, checkpoint = self.args, self.run.checkpoint
        model = AdaptedDenoiser(
            self.pipe,
            self.config,
            train_text_encoder=args.train_text_encoder,
            gradient_checkpointing=args.gradient_checkpointing,
            family=self.family,
        )
        if args.init_adapter is not None:
            start_from(model.components, args.init_adapter, self.pipe)
            self.before = self.evaluation.measure_model(model, "before")
        if checkpoint is not None:
            read_checkpoint(model, checkpoint)
        return model

    def report(self) -> dict[str, Any]:
        """Measure, write the report, and return the content of results.json."""
        args, run = self.args, self.run
        before = self.before or self.evaluation.measure(None, "before")
        after = self.evaluation.measure(run.folder, "after")
        data = self.facts["trained on"]
        return finish(
            run,
            before,
            after,
            names=(*FIGURES, "curve"),
            figures=figures(before, after, FIGURES),
            facts=self.facts,
            schedule_line=schedule_line(args, self.family),
            warnings=forgetting(before, after),
            describe=partial(describe, self.evaluation, before, after, self.pipe, data),
            n=len(after.images),
            trainable_parameters=self.trainable,
            base_model=args.pretrained_model_name_or_path,
            resolution=args.resolution,
        )


def digested(records: Sequence[ImageRecord]) -> list[str]:
    """Return everything that a sample depends on, for the digest of the data."""
    return [text for record in records for text in (record.key, record.prompt)]


if __name__ == "__main__":
    run_command(main, DreamBoothArguments, read_flags(ImageFlags), shipped_run)
