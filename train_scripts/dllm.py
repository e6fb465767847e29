"""Fine-tunes a masked-diffusion language model (LLaDA, Dream, …) with NaRA or another adapter, and measures the gain.

The shipped model and task, offline, on CPU, in minutes:
    accelerate launch train_scripts/dllm.py
LLaDA-8B on all GPUs of the machine (--num_processes N: on N of them), in steps of global_batch_size samples together:
    accelerate launch train_scripts/dllm.py --config train_scripts/configs/llada_instruct_math14k.yaml

With --adapter lora, dora, …, full the same is done by another method; --help lists them. --init_adapter starts from
a LoRA or NaRA. --min_noise_level and --max_noise_level train a part of the noise levels (docs/windows.md).

Written to the output folder: adapter_config.json and adapter_model.safetensors (a model folder, for --adapter full),
README.md (the model card, which says how to load them), config.yaml, results.json, metrics.jsonl,
noise_level_curve.png, samples.html, and checkpoint-N folders to resume from.
"""

# ruff: noqa: RUF009 (option() is dataclasses.field() with metadata, not a shared default)
from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nara_diffusion.check.check_tasks import text_task
from nara_diffusion.check.verdict_report import check_training
from nara_diffusion.dllm import AnswerCollator, encode_records, exact_match, load_backbone, masked_diffusion_loss
from nara_diffusion.dllm.canvas import check_canvas, check_positions
from nara_diffusion.dllm.data.collator import GlobalBatchStream, TrainedCanvas, with_longest
from nara_diffusion.dllm.data.encoding import end_token_id
from nara_diffusion.dllm.data.records import load_records
from nara_diffusion.dllm.evaluation.before_after import compare, measure, validation_losses
from nara_diffusion.dllm.evaluation.report import results_table, window_note, write_run_report
from nara_diffusion.dllm.masking import check_drawable
from nara_diffusion.training.adapters.build import base_model, build_adapter, recompute_activations
from nara_diffusion.training.adapters.init_adapter import start_from
from nara_diffusion.training.adapters.method_arguments import without_unread
from nara_diffusion.training.adapters.methods import title_of
from nara_diffusion.training.arguments.checks import check_arguments, require
from nara_diffusion.training.arguments.cli import option
from nara_diffusion.training.arguments.common import AdapterArguments, OptimizationArguments, RunArguments
from nara_diffusion.training.arguments.window import WindowArguments, check_window, schedule_of, window_of
from nara_diffusion.training.checkpoints.digests import local_folder
from nara_diffusion.training.checkpoints.folders import save_adapter
from nara_diffusion.training.engine.state import load_whole, loading_in, prepare
from nara_diffusion.training.formats import load_checkpoint
from nara_diffusion.training.loop import train
from nara_diffusion.training.main import run_command
from nara_diffusion.training.oom import explaining_out_of_memory
from nara_diffusion.training.optimization import build_optimizer, build_scheduler
from nara_diffusion.training.output.run_report import publish, window_facts
from nara_diffusion.training.run import Run, start_run
from nara_diffusion.training.stream import count_steps, stream_loader
from nara_diffusion.utils.atomic_write import atomic_write_files

logger = logging.getLogger(__name__)

ASSETS = Path(os.path.relpath(Path(__file__).parents[1] / "examples" / "assets"))
# Arguments that `exact_match` takes under the same name.
SAMPLING = ("gen_length", "block_length", "temperature", "cfg_scale", "remasking", "extract")

# What a run does where no model is named; the flags' own defaults suit models of some billion parameters.
SHIPPED_DATA = {
    f"{split}_file": str(ASSETS / "two-step" / f"{split}.jsonl") for split in ("train", "validation", "test")
}
SHIPPED_RUN = {
    "pretrained_model_name_or_path": str(ASSETS / "llada-tiny"),
    "target_modules": ["all-linear"],
    "train_batch_size": 32,
    "num_train_epochs": 3.2,  # 400 steps
    "learning_rate": 1e-2,
    "core_learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "checkpointing_steps": 200,
    "eval_batch_size": 64,
    "gen_length": 12,
}


@dataclass
class ModelArguments:
    """Model and data"""

    pretrained_model_name_or_path: str = option(
        "", "Folder or Hub id of the model to adapt; none runs the shipped one.", content="base model"
    )
    revision: str | None = option(None, "Branch, tag or commit of the model on the Hub.", content="base model")
    mask_token: str | None = option(None, "Text of the mask token, where the checkpoint doesn't name it.")
    ignore_tensors: list[str] | None = option(None, "Heads in the checkpoint to leave out, such as classifier.")
    dataset_name: str | None = option(
        None,
        "Data set on the Hub, or a folder that `datasets` reads, in place of files.",
        content="training data",
    )
    dataset_config_name: str | None = option(None, "Configuration of that data set.")
    train_file: str | None = option(None, "JSON list or JSON Lines, or gzip of one.", content="training data")
    validation_file: str | None = option(
        None, "Records for the validation loss; none holds out --validation_samples.", content="validation data"
    )
    test_file: str | None = option(
        None, "Records for exact match, before and after; none takes the validation ones.", resumable=True
    )
    validation_samples: int | None = option(
        None,
        "Records held out of the training data, if there is no file; none takes a tenth of them, 128 at most.",
        unit="records",
    )
    test_samples: int | None = option(None, "Use the first so many test records; none uses all.", unit="records")
    instruction_field: str = option("instruction", "Field of a record with the question.")
    input_field: str = option("input", "Field with the question's second part; records may lack it.")
    output_field: str = option("output", "Field with what the model learns to write.")
    answer_field: str = option("answer", "Field with what a generation is compared with.")
    max_length: int = option(
        512, "Length of prompt and answer together, without padding; longer answers are cut.", unit="tokens"
    )


@dataclass
class ObjectiveArguments:
    """Objective and evaluation"""

    trained_padding: str = option(
        "gen_length",
        "How far end tokens after an answer are trained on: gen_length, as far as generation goes; longest, the "
        "longest sample of the global batch; max_length; or a number of tokens.",
        unit="tokens",
    )
    complementary: bool = option(False, "Train on each sample twice, with complementary masks.")
    eval_batch_size: int = option(16, "Samples of one forward in evaluation.", unit="samples")
    gen_length: int = option(128, "Length of a generated answer.", unit="tokens")
    generation_steps: int | None = option(None, "Denoising steps of an answer; none takes one a token.", unit="steps")
    block_length: int | None = option(
        None, "Block that is finished before the next is begun; none is one.", unit="tokens"
    )
    temperature: float = option(0.0, "Of sampling; 0 takes the likeliest token.")
    cfg_scale: float = option(0.0, "Classifier-free guidance; 0 disables it.")
    remasking: str = option("low_confidence", "Which tokens stay masked.", choices=("low_confidence", "random"))
    extract: str = option(
        "text", "What is compared: text, the last number, choice.", choices=("text", "number", "choice")
    )
    curve_points: int = option(10, "Noise levels at which the picture shows the loss.", unit="points")


@dataclass
class Arguments(
    ModelArguments, AdapterArguments, OptimizationArguments, ObjectiveArguments, WindowArguments, RunArguments
):
    def __post_init__(self) -> None:
        check_arguments(self)
        check_window(self)
        check_drawable(window_of(self), self.complementary)
        for name in ("max_length", "eval_batch_size", "gen_length", "curve_points"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("validation_samples", "test_samples"):
            require(self, name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1, or none")
        require(self, "pretrained_model_name_or_path", self.pretrained_model_name_or_path != "", "given")
        if (self.train_file is None) == (self.dataset_name is None):
            got = "neither" if self.train_file is None else "both"
            raise ValueError(f"training data come from train_file or from dataset_name: give one of them, got {got}.")
        words = ("gen_length", "longest", "max_length")
        if self.trained_padding not in words and not self.trained_padding.isdecimal():
            raise ValueError(f"trained_padding is {self.trained_padding!r}, expected {', '.join(words)} or a number.")


def shipped_run(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the shipped run, where no model was `given`; without its data, where other data were."""
    if "pretrained_model_name_or_path" in given:
        return {}
    data = {} if {"train_file", "dataset_name"} & given.keys() else SHIPPED_DATA
    return without_unread(SHIPPED_RUN | data, given)


@explaining_out_of_memory
def main(args: Arguments) -> dict[str, Any]:
    """Trains, measures before and after, saves; returns what results.json holds."""
    with start_run(args, "dllm") as run:
        return fine_tune(args, run)


def fine_tune(args: Arguments, run: Run) -> dict[str, Any]:
    """The run from its data to its report."""
    started = time.perf_counter()

    # Data
    records = load_records(args)
    for what, part in zip(("training data", "validation data"), records, strict=False):
        run.record_data_digest(what, (text for column in part.column_names for text in part[column]))

    # Model
    options: dict[str, Any] = {"mask_token": args.mask_token, "ignore_tensors": args.ignore_tensors or ()}
    options |= {} if args.revision is None else {"revision": args.revision}
    load = partial(load_backbone, args.pretrained_model_name_or_path, **options)
    with loading_in(run.accelerator, run.weights_dtype):
        backbone, tokenizer = load(dtype=run.weights_dtype)
    run.record_base_digests({"": local_folder(args.pretrained_model_name_or_path, revision=args.revision)})
    check_positions(backbone, args.max_length)
    encoded = [encode_records(part, tokenizer, max_length=args.max_length, progress=run.is_main) for part in records]
    train_rows, validation_rows, test_rows = (part.rows for part in encoded)
    padding = int(args.trained_padding) if args.trained_padding.isdecimal() else args.trained_padding
    collator = AnswerCollator(end_token_id(tokenizer), padding, args.max_length, args.gen_length)
    validation_rows = with_longest(validation_rows, run.global_batch)
    longest, longest_prompt = (max(getattr(part, name) for part in encoded) for name in ("longest", "longest_prompt"))
    canvas_prompt = longest_prompt if padding == "gen_length" else encoded[-1].longest_prompt  # of the test records
    check_canvas(backbone, canvas_prompt, args.gen_length)
    if args.gradient_checkpointing:
        recompute_activations(backbone)
    objective: dict[str, Any] = {"seed": args.seed, "group_size": run.global_batch}
    objective |= {"complementary": args.complementary, "window": window_of(args)}
    if args.check:
        device = run.accelerator.device
        task = text_task(backbone, args, train_rows, validation_rows, collator, objective, device)
        results, shown = check_training(task, args, run)
        print(shown)
        return results
    steps = count_steps(len(train_rows), run.global_batch, args.max_train_steps, args.num_train_epochs)
    model = build_adapter(backbone, args, total_steps=steps, strength=schedule_of(args))
    check_canvas(model, canvas_prompt, args.gen_length)  # once more: the adapter may take some positions
    check_positions(model, args.max_length, longest=collator.padded_length(longest, longest_prompt))
    if run.checkpoint is not None:
        load_checkpoint(model, run.checkpoint)
    elif args.init_adapter is not None:
        start_from({"": backbone}, args.init_adapter, backbone)

    # Train
    optimizer = build_optimizer(model, args, run.global_batch, fused=run.fuses_optimizer)
    scheduler = build_scheduler(optimizer, args, steps)
    stream = GlobalBatchStream(train_rows, args.seed, run.global_batch)
    canvas = TrainedCanvas(stream, collator, args.gen_length, args.block_length)
    if run.is_main and (warning := canvas.warning()):
        logger.warning("%s", warning)
    loader = stream_loader(stream, collator, **run.batches(steps), num_workers=args.dataloader_num_workers)
    model, optimizer, scheduler, loader = prepare(run.accelerator, model, optimizer, scheduler, loader)
    adapted = run.accelerator.unwrap_model(model)
    sampling: dict[str, Any] = {name: getattr(args, name) for name in SAMPLING} | {"steps": args.generation_steps}
    longest_prompt = max(test_rows, key=lambda row: row["prompt_length"])
    exact_match(adapted, tokenizer, [longest_prompt], **sampling, progress=False)  # bad settings show now
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    facts = {
        "adapter": title_of(args),
        "optimizer steps": f"{steps} of {run.global_batch} samples, from {len(train_rows)} records",
        "validation": f"{len(validation_rows)} records, {args.validation_file or 'held out of the training data'}",
        "canvas": canvas.fact(),
        "trainable parameters": f"{trainable:,}",
        "hardware": run.hardware,
        **window_facts(args),
    }
    run.open(facts)
    held_out: dict[str, Any] = {"collator": collator, "seed": args.seed, "batch_size": args.eval_batch_size}
    loss = partial(masked_diffusion_loss, model, **objective)
    validate = partial(
        validation_losses, run.accelerator, adapted, validation_rows, **held_out, window=objective["window"]
    )
    train(run, model, optimizer, scheduler, loader, steps, lambda batch: loss(**batch), validate)

    # Save
    save_adapter(run.accelerator, model, run.folder)
    if args.adapter == "full" and run.is_main:
        with atomic_write_files(run.folder) as unfinished:
            tokenizer.save_pretrained(unfinished)  # a model folder has one
    parts = (tokenizer, validation_rows, test_rows)
    options = {**held_out, "curve_points": args.curve_points, **sampling}
    load_base = partial(load_whole, run.accelerator, lambda: load(dtype=run.dtype)[0].to(run.accelerator.device))
    with base_model(adapted, load_base) as base:
        before = measure(run.accelerator, base, *parts, **options)
    after = measure(run.accelerator, adapted, *parts, **options)
    results = {"seconds": round(time.perf_counter() - started, 1), "n": len(test_rows), **compare(before, after)}
    results |= {"adapter": args.adapter, "trainable_parameters": trainable}
    if run.is_main:
        facts |= {"time": f"{results['seconds']:.0f} s, evaluation included"}
        write_run_report(run.folder, args, facts, before, after, load_from=run.hub_id or str(run.folder))
        print(publish(run, results, results_table(before, after), window_note(args)))
    return results


if __name__ == "__main__":
    run_command(main, Arguments, __doc__, SHIPPED_RUN, shipped_run)
