"""Fine-tune a masked-diffusion language model: data, model, training, report.

`nara_flags.text` has the flags, and the text of `--help`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nara_diffusion.dllm import encode_records, load_backbone
from nara_diffusion.dllm.batches import GlobalBatchStream, with_longest
from nara_diffusion.dllm.canvas_coverage import trained_canvas
from nara_diffusion.dllm.held_out import rows_in_training, without_held_out
from nara_diffusion.dllm.kinds import kind_of
from nara_diffusion.dllm.models.backbone import Backbone
from nara_diffusion.dllm.models.quantised import prepare_quantised
from nara_diffusion.dllm.sampler import answer_prompts
from nara_diffusion.dllm.text_arguments import (
    adapter_options,
    load_records,
)
from nara_diffusion.dllm.text_lengths import check_canvas, check_positions, checked_lengths
from nara_diffusion.dllm.text_report import (
    Evaluation,
    Measurement,
    describe,
    figures,
    schedule_line,
)
from nara_diffusion.dllm.tokenizer import end_token_id, stop_token_ids
from nara_diffusion.training.adapter_weights import (
    load_checkpoint,
    start_from,
    write_adapter,
    write_checkpoint,
)
from nara_diffusion.training.adapters import build_adapter, start_facts, title_of, window_facts
from nara_diffusion.training.arguments import schedule_of, window_of
from nara_diffusion.training.checkpoints import save_adapter
from nara_diffusion.training.command import run_command
from nara_diffusion.training.engine_state import write_trained
from nara_diffusion.training.engines import (
    check_whole,
    load_whole,
    loading_in,
    recompute_activations,
)
from nara_diffusion.training.loop import prepare_training, train
from nara_diffusion.training.plan import show_plan
from nara_diffusion.training.report import finish
from nara_diffusion.training.run import Run, start_run
from nara_diffusion.utils.files import atomic_write_files, counted, local_folder
from nara_flags.parser import read_flags
from nara_flags.text import TextFlags

from .text_arguments import Arguments, shipped_run
from .text_plan import planned_text_step

logger = logging.getLogger(__name__)


def main(args: Arguments) -> dict[str, Any]:
    """Train, measure before and after, save, and return the content of results.json.

    With `plan`, only print the memory and FLOPs of the run, and return these figures.
    """
    if args.plan is not None:
        return show_plan(args, planned_text_step)
    with start_run(args, "dllm", write_checkpoint) as run:
        tuning = FineTuning(args, run)
        tuning.train()
        return tuning.report()


class FineTuning:
    """One training run.

    The constructor loads the rows and the base model, and raises all errors that can be found
    without an adapter. Then call `train` and `report`.
    """

    def __init__(self, args: Arguments, run: Run[Arguments]) -> None:
        self.args, self.run = args, run
        self.start: dict[str, Tensor] = {}  # the trained weights of --init_adapter
        with run.accelerator.main_process_first():  # the other processes read its cache
            self.records = load_records(args)
        self._load_base()
        self._encode_records()
        self._check_lengths()
        measured = (self.validation_rows, self.test_rows, self.collator, self.sampling)
        self.evaluation = Evaluation(run, self.tokenizer, *measured, self.kind)
        if args.gradient_checkpointing:
            recompute_activations(self.backbone)
        self.objective: dict[str, Any] = {"seed": args.seed, "group_size": run.global_batch}
        self.objective |= {"window": window_of(args), **self.kind.objective(args)}

    def _load_base(self) -> None:
        """Load the base model and its tokenizer."""
        args, run = self.args, self.run
        options: dict[str, Any] = {}
        for name in ("mask_token", "load_in_4bit", "load_in_8bit", "revision"):
            value = getattr(args, name)
            if value:
                options[name] = value
        if args.is_quantised:
            options["device_map"] = {"": str(run.accelerator.device)}
        self.options = options
        with loading_in(run.accelerator, run.weights_dtype):
            self.backbone, self.tokenizer = self._load(run.weights_dtype)
        if self.kind.whole_because:
            check_whole(run.accelerator, self.kind.whole_because)
        if args.is_quantised:
            prepare_quantised(self.backbone)
        folder = local_folder(args.pretrained_model_name_or_path, revision=args.revision)
        run.record_base_digests({"": folder})
        self.sampling = args.sampling()
        is_chat = self.tokenizer.chat_template is not None
        self.sampling = self.kind.sampling(Backbone(self.backbone), self.sampling, is_chat)

    def _load(self, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return the base model and its tokenizer."""
        args = self.args
        name = args.pretrained_model_name_or_path
        model, tokenizer = load_backbone(name, dtype=dtype, **self.options)
        self.kind = kind_of(Backbone(model))
        self.kind.configure(model, args)
        return model, tokenizer

    def _encode_records(self) -> None:
        """Turn the records into rows, and warn if rows for measuring are also trained on."""
        args, run = self.args, self.run
        encode = partial(
            encode_records,
            tokenizer=self.tokenizer,
            max_length=checked_lengths(self.backbone, args.max_length, args.gen_length),
            max_prompt_length=args.max_prompt_length,
            train_on=args.train_on,
        )
        training_records, validation_records, test_records = self.records
        with run.accelerator.main_process_first():
            training = encode(training_records, name="training data")
            validation = test = encode(validation_records, name="validation data")
            if test_records is not validation_records:
                test = encode(test_records, name="test data")
        if args.validation_file is None:
            training = without_held_out(training, validation)
        run.record_data_digest("training data", [training.digest()])
        run.record_data_digest("validation data", [validation.digest()])
        self.train_rows, self.test_rows = training.rows, test.rows
        self.validation_rows = with_longest(validation.rows, run.global_batch)
        self.encoded = (training, validation, test)
        measured = {"validation": validation.rows}
        if test is not validation:
            measured["test"] = test.rows
        self.warnings = rows_in_training(training.rows, **measured)
        self._warn(self.warnings)

    def _check_lengths(self) -> None:
        """Find the longest sample and the longest canvas, and check them."""
        args = self.args
        end = end_token_id(self.tokenizer)
        self.collator = self.kind.collator(Backbone(self.backbone), args, end)
        longest = max(part.longest for part in self.encoded)
        longest_prompt = max(part.longest_prompt for part in self.encoded)
        self.padded = self.collator.padded_length(longest, longest_prompt, longest)
        # training makes each prompt a canvas if it pads as far as generation does
        generated = self.encoded if args.trained_padding == "gen_length" else self.encoded[-1:]
        hardest = max(generated, key=lambda part: part.longest_prompt)
        self.canvas = (hardest.longest_prompt, args.gen_length, hardest.longest_prompt_in)
        check_canvas(self.backbone, *self.canvas)

    def _warn(self, warnings: Sequence[str]) -> None:
        if self.run.is_main:
            for warning in warnings:
                logger.warning("%s", warning)

    def train(self) -> None:
        """Train the adapter, starting from the run's checkpoint if there is one, and save it."""
        args, run = self.args, self.run
        stream = GlobalBatchStream(self.train_rows, args.seed, run.global_batch)
        steps = run.plan(len(stream.samples))
        model = self._adapt()
        parts = prepare_training(run, model, stream, self.collator)
        model = parts[0]
        self.adapted: Any = run.accelerator.unwrap_model(model)
        self._try_longest_prompt()
        self.trainable = sum(p.numel() for p in self.adapted.parameters() if p.requires_grad)
        self.facts = self._facts(stream, steps)
        run.open(self.facts)
        run.restore()
        loss = partial(self.kind.loss, model, **self.objective)
        validate = partial(self.evaluation.validate, self.adapted)
        train(run, parts, lambda batch: loss(**batch), validate)
        save_adapter(run.accelerator, model, run.folder, write_adapter)
        if args.adapter == "full" and run.is_main:
            with atomic_write_files(run.folder) as unfinished:
                self.tokenizer.save_pretrained(unfinished)  # a model folder has one

    def _adapt(self) -> nn.Module:
        """Return the base model with its adapter, and set `start` with --init_adapter."""
        args, checkpoint = self.args, self.run.checkpoint
        options = adapter_options(self.backbone, args)
        model = build_adapter(self.backbone, args, strength=schedule_of(args), **options)
        check_canvas(model, *self.canvas)  # again, since the adapter may take some positions
        what = f"samples have up to {self.padded} tokens"
        check_positions(model, self.padded, what, "lower --max_length")
        if args.init_adapter is not None:
            start_from({"": self.backbone}, args.init_adapter, self.backbone)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    self.start[name] = parameter.detach().cpu().clone()
        if checkpoint is not None:
            load_checkpoint(model, checkpoint)
        return model

    def _try_longest_prompt(self) -> None:
        """Answer the longest test prompt, so that failures of generation come before training."""
        lengths = list(self.test_rows["prompt_length"])
        row = self.test_rows[lengths.index(max(lengths))]
        prompt = row["input_ids"][: row["prompt_length"]]
        ends = stop_token_ids(self.adapted, self.tokenizer)
        answer_prompts(self.adapted, [prompt], eos_token_id=ends, **vars(self.sampling))

    def _facts(self, stream: GlobalBatchStream, steps: int) -> dict[str, str]:
        """Return {what: value} about the run, for the log and the model card."""
        args, run = self.args, self.run
        block = self.sampling.block
        canvas, warnings = trained_canvas(stream, self.collator, args.gen_length, block)
        self._warn(warnings)
        training, validation, _ = (part.info.description for part in self.records)
        if "turns" in self.records[0].column_names:
            training = f"{training}, train_on {args.train_on}"
        if not args.validation_file:
            validation = f"{validation}, held out of the training data"
        return {
            "adapter": title_of(args),
            **start_facts(args),
            "base": str(args.pretrained_model_name_or_path),
            "optimizer steps": f"{steps} of {counted(run.global_batch, 'sample')}",
            "training data": f"{counted(len(stream.samples), 'record')} of {training}",
            "validation data": f"{counted(len(self.validation_rows), 'row')} of {validation}",
            "canvas": canvas,
            "trainable parameters": f"{self.trainable:,}",
            "hardware": run.hardware,
            **window_facts(args),
        }

    def report(self) -> dict[str, Any]:
        """Measure the trained model and the one that it started from, and write the report."""
        args, run = self.args, self.run
        after = self.evaluation.measure(self.adapted)
        before = self._measure_start()
        question = self.test_rows[0]["instruction"]
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

    def _measure_start(self) -> Measurement:
        """Measure the base model, or with --init_adapter the base with that adapter."""
        accelerator = self.run.accelerator
        if self.start:
            write_trained(accelerator, self.adapted, self.start)
            return self.evaluation.measure(self.adapted)
        if self.args.adapter != "full":
            with self.adapted.disable_adapter():
                return self.evaluation.measure(self.adapted)

        def load() -> PreTrainedModel:
            model: Any = self._load(self.run.dtype)[0]
            return model.to(accelerator.device)

        return self.evaluation.measure(load_whole(accelerator, load))


if __name__ == "__main__":
    run_command(main, Arguments, read_flags(TextFlags), shipped_run)
