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
noise_level_curve.png, samples.jsonl, and checkpoint-N folders to resume from.

The shipped model has settings of its own, not the defaults below: train_scripts/configs/llada_tiny.yaml.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import partial
from typing import Any

from nara_diffusion.dllm import (
    AnswerCollator,
    encode_records,
    exact_match,
    load_backbone,
    masked_diffusion_loss,
)
from nara_diffusion.dllm.batches import (
    GlobalBatchStream,
    rows_in_training,
    with_longest,
    without_held_out,
)
from nara_diffusion.dllm.before_after import Evaluation, describe, figures, schedule_line
from nara_diffusion.dllm.canvas import (
    check_canvas,
    check_positions,
    checked_lengths,
    trained_canvas,
)
from nara_diffusion.dllm.decoding import Sampling, chat_settings
from nara_diffusion.dllm.models.pretrained import prepare_quantised
from nara_diffusion.dllm.records import load_records
from nara_diffusion.dllm.tokenizer import end_token_id
from nara_diffusion.training.adapter_weights import (
    load_checkpoint,
    start_from,
    write_adapter,
    write_checkpoint,
)
from nara_diffusion.training.adapters import build_adapter, recompute_activations, title_of
from nara_diffusion.training.arguments import schedule_of, window_of
from nara_diffusion.training.checkpoints import save_adapter
from nara_diffusion.training.command import CONFIGS, run_command, shipped_settings
from nara_diffusion.training.engines import load_whole, loading_in
from nara_diffusion.training.loop import prepare_training, train
from nara_diffusion.training.manifest import local_folder
from nara_diffusion.training.report import finish, window_facts
from nara_diffusion.training.run import Run, start_run
from nara_diffusion.utils.atomic_write import atomic_write_files
from nara_diffusion.utils.naming import counted

from .text_arguments import Arguments

logger = logging.getLogger(__name__)


def shipped_run(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the shipped run, where no model was `given`; without its data, where other data were."""
    if "pretrained_model_name_or_path" in given:
        return {}
    source = "dataset_name" if "dataset_name" in given else "train_file"
    return shipped_settings(
        CONFIGS / "llada_tiny.yaml",
        given,
        (source, "train_file", "validation_file", "test_file"),
        toy="a toy of 64 positions (5 of them a message, and one a letter)",
        told="max_train_steps train_batch_size learning_rate gen_length checkpointing_steps",
        advice="LLaDA-8B add --pretrained_model_name_or_path GSAI-ML/LLaDA-8B-Instruct",
    )


def main(args: Arguments) -> dict[str, Any]:
    """Trains, measures before and after, saves; returns what results.json holds."""
    if args.check:
        raise ValueError("main only trains: for a check call nara_command.check_run(args).")
    with start_run(args, "dllm", write_checkpoint) as run:
        tuning = FineTuning(args, run)
        tuning.train()
        return tuning.report()


class FineTuning:
    """One run. Made, it has its rows and the base model, and whatever can be refused has been; then `train` and
    `report`."""

    def __init__(self, args: Arguments, run: Run) -> None:
        self.args, self.run = args, run
        with run.accelerator.main_process_first():  # the others read its cache
            self.records = load_records(args)
        names = ("mask_token", "load_in_4bit", "load_in_8bit", "revision")
        options: dict[str, Any] = {name: value for name in names if (value := getattr(args, name))}
        if args.is_quantised:
            options["device_map"] = {"": str(run.accelerator.device)}
        self.load = partial(load_backbone, args.pretrained_model_name_or_path, **options)
        with loading_in(run.accelerator, run.weights_dtype):
            self.backbone, self.tokenizer = self.load(dtype=run.weights_dtype)
        if args.is_quantised:
            prepare_quantised(self.backbone)
        run.record_base_digests(
            {"": local_folder(args.pretrained_model_name_or_path, revision=args.revision)}
        )
        settings: dict[str, Any] = {
            field.name: getattr(args, field.name, None) for field in fields(Sampling)
        }
        settings["steps"] = args.generation_steps
        chat = self.tokenizer.chat_template is not None
        self.sampling = Sampling(**(chat_settings(self.backbone, settings) if chat else settings))
        self._encode()
        if args.gradient_checkpointing:
            recompute_activations(self.backbone)
        self.objective: dict[str, Any] = {"seed": args.seed, "group_size": run.global_batch}
        self.objective |= {"complementary": args.complementary, "window": window_of(args)}

    def _encode(self) -> None:
        """Records to rows."""
        args, run = self.args, self.run
        max_length = checked_lengths(self.backbone, args.max_length, args.gen_length)
        with run.accelerator.main_process_first():
            options = {"max_prompt_length": args.max_prompt_length, "train_on": args.train_on}
            encode = partial(
                encode_records, tokenizer=self.tokenizer, max_length=max_length, **options
            )
            training, validation, test = self.records
            encoded = [
                encode(training, name="training data"),
                encode(validation, name="validation data"),
            ]
            encoded.append(encoded[1] if test is validation else encode(test, name="test data"))
        if args.validation_file is None:
            encoded[0] = without_held_out(encoded[0], encoded[1])
        for what, part in zip(("training data", "validation data"), encoded, strict=False):
            run.record_data_digest(what, [part.digest()])
        self.train_rows, validation_rows, self.test_rows = (part.rows for part in encoded)
        measured = {"validation": validation_rows} | (
            {} if test is validation else {"test": self.test_rows}
        )
        self.warnings = rows_in_training(self.train_rows, **measured)
        for warning in self.warnings if run.is_main else []:
            logger.warning("%s", warning)
        self.validation_rows = with_longest(validation_rows, run.global_batch)
        self.collator = AnswerCollator(
            end_token_id(self.tokenizer), args.trained_padding, args.gen_length
        )
        measured_on = (self.validation_rows, self.test_rows, self.collator, self.sampling)
        self.evaluation = Evaluation(run, self.tokenizer, *measured_on)
        longest, longest_prompt = (
            max(getattr(part, n) for part in encoded) for n in ("longest", "longest_prompt")
        )
        self.padded = self.collator.padded_length(longest, longest_prompt, longest)
        prolonged = (
            encoded if args.trained_padding == "gen_length" else encoded[-1:]
        )  # -1: the test records
        hardest = max(prolonged, key=lambda part: part.longest_prompt)
        self.canvas = (hardest.longest_prompt, args.gen_length, hardest.longest_prompt_in)
        check_canvas(self.backbone, *self.canvas)

    def train(self) -> None:
        """Train the adapter, from the run's checkpoint if it has one, and save it."""
        args, run = self.args, self.run
        stream = GlobalBatchStream(self.train_rows, args.seed, run.global_batch)
        steps = run.plan(len(stream.samples))
        model = build_adapter(self.backbone, args, strength=schedule_of(args))
        check_canvas(model, *self.canvas)  # once more: the adapter may take some positions
        check_positions(
            model, self.padded, f"samples have up to {self.padded} tokens", "lower --max_length"
        )
        if run.checkpoint is not None:
            load_checkpoint(model, run.checkpoint)
        elif args.init_adapter is not None:
            start_from({"": self.backbone}, args.init_adapter, self.backbone)
        parts = prepare_training(run, model, stream, self.collator)
        model = parts[0]
        self.adapted: Any = run.accelerator.unwrap_model(model)
        hardest: Any = max(self.test_rows, key=lambda row: row["prompt_length"])  # type: ignore[index]
        exact_match(
            self.adapted, self.tokenizer, [hardest], **asdict(self.sampling), progress=False
        )  # what fails, now
        self.trainable = sum(p.numel() for p in self.adapted.parameters() if p.requires_grad)
        self.facts = self._facts(stream, steps)
        run.open(self.facts)
        loss = partial(masked_diffusion_loss, model, **self.objective)
        train(
            run, parts, lambda batch: loss(**batch), partial(self.evaluation.validate, self.adapted)
        )
        save_adapter(run.accelerator, model, run.folder, write_adapter)
        if args.adapter == "full" and run.is_main:
            with atomic_write_files(run.folder) as unfinished:
                self.tokenizer.save_pretrained(unfinished)  # a model folder has one

    def _facts(self, stream: GlobalBatchStream, steps: int) -> dict[str, str]:
        """{what: value} of the run, for its log and its card."""
        args, sources = self.args, [part.info.description for part in self.records]
        canvas, warnings = trained_canvas(
            stream, self.collator, args.gen_length, self.sampling.block
        )
        for warning in warnings if self.run.is_main else []:
            logger.warning("%s", warning)
        train_on = f", train_on {args.train_on}" if "turns" in self.records[0].column_names else ""
        return {
            "adapter": title_of(args),
            "base": str(args.pretrained_model_name_or_path),
            "optimizer steps": f"{steps} of {counted(self.run.global_batch, 'sample')}",
            "training data": f"{counted(len(stream.samples), 'record')} of {sources[0]}{train_on}",
            "validation data": f"{counted(len(self.validation_rows), 'row')} of {sources[1]}"
            + ("" if args.validation_file else ", held out of the training data"),
            "canvas": canvas,
            "trainable parameters": f"{self.trainable:,}",
            "hardware": self.run.hardware,
            **window_facts(args),
        }

    def report(self) -> dict[str, Any]:
        """Measure the base and the adapted model, and write what is found."""
        args, run, load = self.args, self.run, self.load
        if args.adapter == "full":
            base = load_whole(
                run.accelerator, lambda: load(dtype=run.dtype)[0].to(run.accelerator.device)
            )
            before = self.evaluation.measure(base)
            del base
        else:
            with self.adapted.disable_adapter():
                before = self.evaluation.measure(self.adapted)
        after = self.evaluation.measure(self.adapted)
        asked = (self.records[2][place].get("turns") for place in self.test_rows["record"])
        question: Any = next(filter(None, asked), self.test_rows[0]["instruction"])
        return finish(
            run,
            before,
            after,
            names=("exact_match", "validation_loss", "curve"),
            figures=figures(before, after),
            facts=self.facts,
            schedule_line=schedule_line(args),
            describe=partial(describe, self.evaluation, before, after, question),
            warnings=self.warnings,
            n=len(self.test_rows),
            trainable_parameters=self.trainable,
        )


if __name__ == "__main__":
    run_command(main, Arguments, __doc__, shipped_run)
