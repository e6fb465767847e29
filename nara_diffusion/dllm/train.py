"""Fine-tune a masked-diffusion language model: data, model, training, report.

`nara_flags.text` has the flags, and the text of `--help`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from nara_diffusion.training.adapter_weights import (
    load_checkpoint,
    start_from,
    write_adapter,
    write_checkpoint,
)
from nara_diffusion.training.adapters import build_adapter, start_facts, title_of, window_facts
from nara_diffusion.training.arguments import schedule_of, window_of
from nara_diffusion.training.checkpoints import save_adapter, write_trained
from nara_diffusion.training.command import run_command
from nara_diffusion.training.engines import load_whole, recompute_activations
from nara_diffusion.training.loop import prepare_training, train
from nara_diffusion.training.plan import show_plan
from nara_diffusion.training.report import finish
from nara_diffusion.training.run import Run, start_run
from nara_diffusion.utils.files import atomic_write_files
from nara_diffusion.utils.wording import counted
from nara_flags.parser import read_flags
from nara_flags.text import TextFlags

from .batches import GlobalBatchStream, trained_canvas
from .text_arguments import Arguments, adapter_options, shipped_run
from .text_data import TextBase, TextData, encode_data, load_base, load_model, load_records
from .text_plan import planned_text_step
from .text_report import Evaluation, Measurement, describe, figures, schedule_line

logger = logging.getLogger(__name__)


def main(args: Arguments) -> dict[str, Any]:
    """Train, measure before and after, save, and return the content of results.json.

    With `plan`, only print the memory and FLOPs of the run, and return these figures.
    """
    if args.plan is not None:
        return show_plan(args, planned_text_step)
    with start_run(args, "dllm", write_checkpoint) as run:
        setup = prepare(args, run)
        return report(setup, fine_tune(setup))


@dataclass(frozen=True)
class Setup:
    """All that a training needs, except its adapter.

    Attributes:
        objective: arguments of the kind's loss.
    """

    args: Arguments
    run: Run[Arguments]
    base: TextBase
    data: TextData
    evaluation: Evaluation
    objective: Mapping[str, Any]


def prepare(args: Arguments, run: Run[Arguments]) -> Setup:
    """Load the data and the base model.

    Raises:
        ValueError: all errors that can be found without an adapter.
    """
    with run.accelerator.main_process_first():  # the other processes read its cache
        records = load_records(args)
    base = load_base(args, run)
    data = encode_data(args, run, base, records)
    _warn(run, data.warnings)
    objective = {"seed": args.seed, "group_size": run.global_batch, "window": window_of(args)}
    objective |= base.kind.objective(args)
    if args.gradient_checkpointing:
        recompute_activations(base.model)
    return Setup(args, run, base, data, Evaluation(run, base, data), objective)


def _warn(run: Run[Arguments], warnings: Sequence[str]) -> None:
    if run.is_main:
        for warning in warnings:
            logger.warning("%s", warning)


@dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
        model: the model with its adapter, without the engine's wrapper.
        start: the trained weights before training, with --init_adapter.
        trainable: the number of trained parameters.
        facts: {what: value} about the run, for the log and the model card.
    """

    model: Any
    start: Mapping[str, Tensor]
    trainable: int
    facts: Mapping[str, str]


def fine_tune(setup: Setup) -> Trained:
    """Train an adapter, starting from the run's checkpoint if there is one, and save it."""
    args, run, base = setup.args, setup.run, setup.base
    rows, collator = setup.data.training.rows, setup.data.collator
    lengths = collator.row_lengths(rows) if args.group_by_length else None
    stream = GlobalBatchStream(rows, args.seed, run.global_batch, lengths)
    steps = run.plan(len(stream.samples))
    model, start = adapt(setup)
    parts = prepare_training(run, model, stream, collator)
    adapted: Any = run.accelerator.unwrap_model(parts.model)
    prompts = list(setup.data.test.rows["prompt_length"])
    longest = prompts.index(max(prompts))
    setup.evaluation.generations(adapted, [longest])  # failures of generation come before training
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    facts = run_facts(setup, stream, steps, trainable)
    run.open(facts)
    run.restore()
    loss = partial(base.kind.loss, parts.model, **setup.objective)
    validate = partial(setup.evaluation.validate, adapted)
    train(run, parts, lambda batch: loss(**batch), validate, base.kind.figures)
    save_adapter(run.accelerator, parts.model, run.folder, write_adapter)
    if args.adapter == "full" and run.is_main:
        with atomic_write_files(run.folder) as unfinished:
            base.tokenizer.save_pretrained(unfinished)  # a model folder has one
    return Trained(adapted, start, trainable, facts)


def adapt(setup: Setup) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the base model with its adapter, and the weights of --init_adapter."""
    args, base = setup.args, setup.base.model
    model = build_adapter(base, args, strength=schedule_of(args), **adapter_options(base, args))
    setup.data.check_positions(model)
    start: dict[str, Tensor] = {}
    if args.init_adapter is not None:
        start_from({"": base}, args.init_adapter, base)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                start[name] = parameter.detach().cpu().clone()
    if setup.run.checkpoint is not None:
        load_checkpoint(model, setup.run.checkpoint)
    return model, start


def run_facts(
    setup: Setup, stream: GlobalBatchStream, steps: int, trainable: int
) -> dict[str, str]:
    """Return {what: value} about the run, and warn if training and generation don't agree."""
    args, run, data = setup.args, setup.run, setup.data
    canvas, warnings = trained_canvas(
        stream,
        data.collator,
        args.train_batch_size,
        args.gen_length,
        setup.base.sampling.block,
    )
    _warn(run, warnings)
    training, validation = data.training.rows.info, data.validation.rows.info
    return {
        "adapter": title_of(args),
        **start_facts(args),
        "base": str(args.pretrained_model_name_or_path),
        "optimizer steps": f"{steps} of {counted(run.global_batch, 'sample')}",
        "training data": f"{counted(len(stream.samples), 'record')} of {training.description}",
        "validation data": f"{counted(len(data.validation_rows), 'row')} of {validation.description}",
        "canvas": canvas,
        "trainable parameters": f"{trainable:,}",
        "hardware": run.hardware,
        **window_facts(args),
    }


def report(setup: Setup, trained: Trained) -> dict[str, Any]:
    """Measure the trained model and the one that it started from, and write the report."""
    evaluation, test_rows = setup.evaluation, setup.data.test.rows
    at_end = evaluation.measure(trained.model)
    preferences = (f"validation_{name}" for name in setup.base.kind.figures)
    at_start = measure_start(setup, trained)
    question = test_rows[0]["instruction"]
    return finish(
        setup.run,
        at_start,
        at_end,
        names=("exact_match", "validation_loss", "curve", *preferences),
        figures=figures(at_start, at_end),
        facts=trained.facts,
        schedule_line=schedule_line(setup.args),
        describe=partial(describe, evaluation, at_start, at_end, question),
        warnings=setup.data.warnings,
        n=len(test_rows),
        trainable_parameters=trained.trainable,
    )


def measure_start(setup: Setup, trained: Trained) -> Measurement:
    """Measure the base model, or with --init_adapter the base with that adapter."""
    args, run, evaluation = setup.args, setup.run, setup.evaluation
    if trained.start:
        write_trained(run.accelerator, trained.model, trained.start)
        return evaluation.measure(trained.model)
    if args.adapter != "full":
        with trained.model.disable_adapter():
            return evaluation.measure(trained.model)

    def load() -> PreTrainedModel:
        model: Any = load_model(args, run.dtype, run.accelerator.device)[0]
        return model.to(run.accelerator.device)

    return evaluation.measure(load_whole(run.accelerator, load))


if __name__ == "__main__":
    run_command(main, Arguments, read_flags(TextFlags), shipped_run)
