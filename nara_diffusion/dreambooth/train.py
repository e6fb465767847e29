"""Teach an image model a subject from a few images, or few steps: data, model, training, report.

`nara_flags.images` has the flags, and the text of `--help`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from accelerate import DistributedDataParallelKwargs

from nara_diffusion.training.adapter_weights import start_from
from nara_diffusion.training.adapters import title_of, window_facts
from nara_diffusion.training.checkpoints import save_adapter
from nara_diffusion.training.command import run_command
from nara_diffusion.training.engines import SHARDED
from nara_diffusion.training.loop import prepare_training, train
from nara_diffusion.training.plan import show_plan
from nara_diffusion.training.report import finish
from nara_diffusion.training.run import Run, start_run
from nara_diffusion.utils.wording import counted
from nara_flags.images import ImageFlags
from nara_flags.parser import read_flags

from .denoiser import AdaptedDenoiser, read_checkpoint, write_adapter, write_checkpoint
from .distill import student_task
from .fidelity import Task
from .image_arguments import DreamBoothArguments, shipped_run
from .image_plan import planned_image_step
from .image_report import schedule_line, write_samples
from .subject import load_subject, subject_task


def main(args: DreamBoothArguments) -> dict[str, Any]:
    """Train, measure before and after, save, and return the content of results.json.

    With `plan`, only print the memory and FLOPs of the run, and return these figures.
    """
    if args.plan is not None:
        return show_plan(args, planned_image_step)
    with start_run(args, "dreambooth", write_checkpoint) as run:
        engine = run.accelerator.distributed_type
        if engine in SHARDED:
            raise ValueError(
                f"{SHARDED[engine][1]} splits the model between devices, but this script needs all of it on each, to "
                "sample. Launch with --multi_gpu. If memory is short, add --gradient_checkpointing and "
                "--mixed_precision bf16."
            )
        if args.distill_to is not None:
            return teach(student_task(args, run), args, run)
        return teach(subject_task(load_subject(args, run)), args, run)


def teach(task: Task, args: DreamBoothArguments, run: Run) -> dict[str, Any]:
    """Train from the start or a checkpoint, write the adapter and the report.

    Returns:
        The content of results.json.
    """
    steps = run.plan(task.count)
    evaluation = task.evaluation

    # model
    model = AdaptedDenoiser(
        task.pipe,
        task.config,
        train_text_encoder=args.train_text_encoder,
        gradient_checkpointing=args.gradient_checkpointing,
        family=task.family,
    )
    start = None
    if args.init_adapter is not None:
        start_from(model.components, args.init_adapter, task.pipe)
        start = evaluation.measure_model(model, "before")
    if run.checkpoint is not None:
        read_checkpoint(model, run.checkpoint)
    trainable = sum(parameter.numel() for parameter in model.trained.values())

    # training
    # in a forward, one of two denoisers gets no gradients, and never the last layer of SDXL's CLIP
    if len(task.family.trained) > 1 or args.train_text_encoder:
        accelerator: Any = run.accelerator
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    parts = prepare_training(run, model, task.samples, task.collate)
    rounded = f", in {args.bits} bits" if args.bits else ""
    facts = {
        "base": f"{args.pretrained_model_name_or_path} at {args.resolution} pixels{rounded}",
        "adapter": title_of(args),
        **task.facts,
        "optimizer steps": f"{steps} of {counted(run.global_batch, 'sample')}",
        "trainable parameters": f"{trainable:,}",
        "hardware": run.hardware,
        **window_facts(args),
    }
    run.open(facts)
    run.restore()
    loss = replace(task.loss, model=parts.model)
    start = start or evaluation.measure(None, "before")
    evaluation.record(0, start)
    train(run, parts, loss, partial(evaluation.validate, parts.model))
    save_adapter(run.accelerator, parts.model, run.folder, write_adapter)

    # report
    end = evaluation.history.get(steps)  # measured after the last step
    if end is None:
        end = evaluation.measure(run.folder, "after")
        evaluation.record(steps, end)
    if run.is_main:
        write_samples(evaluation, start, end)
    return finish(
        run,
        start,
        end,
        facts=facts,
        schedule_line=schedule_line(args, task.family),
        n=len(end.images),
        trainable_parameters=trainable,
        base_model=args.pretrained_model_name_or_path,
        resolution=args.resolution,
        **task.report(start, end),
    )


if __name__ == "__main__":
    run_command(main, DreamBoothArguments, read_flags(ImageFlags), shipped_run)
