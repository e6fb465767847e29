"""Fine-tune a masked-diffusion language model (LLaDA, Dream, …) with NaRA or another adapter, and measure the gain.

The shipped model and task, offline, on CPU, in minutes:
    accelerate launch train_scripts/dllm.py
LLaDA-8B on all GPUs of the machine (--num_processes N: on N of them), in steps of global_batch_size samples together:
    accelerate launch train_scripts/dllm.py --config train_scripts/configs/llada_instruct_math14k.yaml

Installed without a clone, as `accelerate launch -m nara_diffusion.dllm.train`. With --adapter lora, dora, …, full the
same is done by another method. --init_adapter starts from a LoRA or NaRA. --min_noise_level and --max_noise_level train
a part of the noise levels (docs/strength.md).

Written to the output folder: adapter_config.json and adapter_model.safetensors (a model folder, for --adapter full),
README.md (the model card, which says how to load them), config.yaml, results.json, metrics.jsonl,
noise_level_curve.png, samples.html, and checkpoint-N folders to resume from.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import partial
from typing import Any

from nara_diffusion.check.check_tasks import text_task
from nara_diffusion.check.verdict import check_training
from nara_diffusion.dllm import AnswerCollator, encode_records, exact_match, load_backbone, masked_diffusion_loss
from nara_diffusion.dllm.canvas import check_canvas, check_positions, checked_lengths
from nara_diffusion.dllm.data.collator import GlobalBatchStream, trained_canvas, with_longest
from nara_diffusion.dllm.data.encoding import end_token_id
from nara_diffusion.dllm.data.records import load_records
from nara_diffusion.dllm.decoding import Sampling, chat_settings
from nara_diffusion.dllm.evaluation.before_after import (
    compare,
    measure,
    results_table,
    validation_losses,
    window_note,
    write_run_report,
)
from nara_diffusion.dllm.models.pretrained import prepare_quantised
from nara_diffusion.training.adapter_weights import load_checkpoint, start_from, write_adapter, write_checkpoint
from nara_diffusion.training.adapters import (
    base_model,
    build_adapter,
    recompute_activations,
    title_of,
)
from nara_diffusion.training.arguments import schedule_of, window_of
from nara_diffusion.training.checkpoints import local_folder, save_adapter
from nara_diffusion.training.command import ASSETS, run_command, shipped
from nara_diffusion.training.engines import load_whole, loading_in, prepare
from nara_diffusion.training.loop import train
from nara_diffusion.training.optimization import build_optimizer, build_scheduler
from nara_diffusion.training.report import publish, window_facts
from nara_diffusion.training.run import Run, start_run
from nara_diffusion.training.stream import stream_loader
from nara_diffusion.utils.atomic_write import atomic_write_files
from nara_diffusion.utils.naming import counted

from .text_arguments import Arguments

logger = logging.getLogger(__name__)


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


def shipped_run(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the shipped run, where no model was `given`; without its data, where other data were."""
    if "pretrained_model_name_or_path" in given:
        return {}
    data = {} if {"train_file", "dataset_name"} & given.keys() else SHIPPED_DATA
    return shipped(SHIPPED_RUN | data)


def main(args: Arguments) -> dict[str, Any]:
    """Trains, measures before and after, saves; returns what results.json holds."""
    with start_run(args, "dllm", write_checkpoint) as run:
        return fine_tune(args, run)


def fine_tune(args: Arguments, run: Run) -> dict[str, Any]:
    """The run from its data to its report."""
    started = time.perf_counter()

    # Data
    with run.accelerator.main_process_first():  # the others read its cache
        records = load_records(args)

    # Model
    options: dict[str, Any] = {"mask_token": args.mask_token}
    options |= {} if args.revision is None else {"revision": args.revision}
    if args.is_quantised:
        bits = {"load_in_4bit": args.load_in_4bit, "load_in_8bit": args.load_in_8bit}
        options |= {**bits, "device_map": {"": str(run.accelerator.device)}}
    load = partial(load_backbone, args.pretrained_model_name_or_path, **options)
    with loading_in(run.accelerator, run.weights_dtype):
        backbone, tokenizer = load(dtype=run.weights_dtype)
    if args.is_quantised:
        prepare_quantised(backbone)
    run.record_base_digests({"": local_folder(args.pretrained_model_name_or_path, revision=args.revision)})
    max_length = checked_lengths(backbone, args.max_length, args.gen_length)
    settings: dict[str, Any] = {field.name: getattr(args, field.name, None) for field in fields(Sampling)}
    settings["steps"] = args.generation_steps
    sampling = Sampling(**(chat_settings(backbone, settings) if tokenizer.chat_template else settings))
    with run.accelerator.main_process_first():
        encode = partial(encode_records, tokenizer=tokenizer, max_length=max_length, train_on=args.train_on)
        encoded = [encode(part) for part in records]
    for what, part in zip(("training data", "validation data"), encoded, strict=False):
        run.record_data_digest(what, [part.digest()])
    train_rows, validation_rows, test_rows = (part.rows for part in encoded)
    collator = AnswerCollator(end_token_id(tokenizer), args.trained_padding, args.gen_length)
    validation_rows = with_longest(validation_rows, run.global_batch)
    longest, longest_prompt = (max(getattr(part, name) for part in encoded) for name in ("longest", "longest_prompt"))
    whose = encoded if args.trained_padding == "gen_length" else encoded[-1:]  # else of the test records
    canvas_prompt = max(part.longest_prompt for part in whose)
    check_canvas(backbone, canvas_prompt, args.gen_length)
    if args.gradient_checkpointing:
        recompute_activations(backbone)
    objective: dict[str, Any] = {"seed": args.seed, "group_size": run.global_batch}
    objective |= {"complementary": args.complementary, "window": window_of(args)}
    if args.check:
        device = run.accelerator.device
        task = text_task(backbone, args, train_rows, validation_rows, collator, objective, device)
        results, shown = check_training(task, args, run)
        sys.stdout.write(f"{shown}\n")
        return results
    stream = GlobalBatchStream(train_rows, args.seed, run.global_batch)
    steps = run.plan(len(stream.samples))
    model = build_adapter(backbone, args, strength=schedule_of(args))
    check_canvas(model, canvas_prompt, args.gen_length)  # once more: the adapter may take some positions
    padded = collator.padded_length(longest, longest_prompt, longest)
    check_positions(model, padded, f"samples have up to {padded} tokens", "lower --max_length")
    if run.checkpoint is not None:
        load_checkpoint(model, run.checkpoint)
    elif args.init_adapter is not None:
        start_from({"": backbone}, args.init_adapter, backbone)

    # Train
    optimizer = build_optimizer(model, args, fused=run.fuses_optimizer)
    scheduler = build_scheduler(optimizer, args, steps)
    canvas, warning = trained_canvas(stream, collator, args.gen_length, sampling.block)
    if run.is_main and warning:
        logger.warning("%s", warning)
    loader = stream_loader(stream, collator, **run.batches)
    model, optimizer, scheduler, loader = prepare(run.accelerator, model, optimizer, scheduler, loader)
    adapted: Any = run.accelerator.unwrap_model(model)
    hardest: Any = max(test_rows, key=lambda row: row["prompt_length"])  # type: ignore[index]
    exact_match(adapted, tokenizer, [hardest], **asdict(sampling), progress=False)  # what can't be shows now
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    sources = [part.info.description for part in records]
    facts = {
        "adapter": title_of(args),
        "optimizer steps": f"{steps} of {counted(run.global_batch, 'sample')}",
        "training data": f"{counted(len(stream.samples), 'record')} of {sources[0]}, train_on {args.train_on}",
        "validation data": f"{counted(len(validation_rows), 'row')} of {sources[1]}"
        + ("" if args.validation_file else ", held out of the training data"),
        "canvas": canvas,
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
    train(run, model, optimizer, scheduler, loader, lambda batch: loss(**batch), validate)

    # Save
    save_adapter(run.accelerator, model, run.folder, write_adapter)
    if args.adapter == "full" and run.is_main:
        with atomic_write_files(run.folder) as unfinished:
            tokenizer.save_pretrained(unfinished)  # a model folder has one
    parts = (tokenizer, validation_rows, test_rows)
    options = {**held_out, "curve_points": args.curve_points, "extract": args.extract, "sampling": sampling}
    load_base = partial(load_whole, run.accelerator, lambda: load(dtype=run.dtype)[0].to(run.accelerator.device))
    with base_model(adapted, load_base) as base:
        before = measure(run.accelerator, base, *parts, **options)
    after = measure(run.accelerator, adapted, *parts, **options)
    results = {"seconds": round(time.perf_counter() - started, 1), "n": len(test_rows), **compare(before, after)}
    results |= {"adapter": args.adapter, "trainable_parameters": trainable}
    if run.is_main:
        facts |= {"time": f"{results['seconds']:.0f} s, evaluation included"}
        write_run_report(run.folder, args, facts, before, after, load_from=run.hub_id or str(run.folder))
        publish(run, results, results_table(before, after), window_note(args))
    return results


if __name__ == "__main__":
    run_command(main, Arguments, __doc__, shipped_run)
