"""The report of a text run: measurements before and after training, and texts for the model card.

All processes share the work of measuring.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from nara_diffusion.training.arguments import method_of, schedule_of, window_of
from nara_diffusion.training.engines import split_across_processes
from nara_diffusion.training.report import (
    core_import,
    needs_schedule,
    reads_noise,
    validation_means,
    write_text,
)
from nara_diffusion.training.run import Run

from .batches import batches_of
from .exact_match import exact_match
from .mask_draws import draw_noise_levels
from .models.backbone import evaluating
from .text_arguments import Arguments
from .text_data import TextBase, TextData

_LOADING = """\
```python
import torch
{imports}
from nara_diffusion.dllm import encode_prompts, generate, load_backbone, prompt_text

{loading}
prompt = torch.tensor(encode_prompts(tokenizer, [prompt_text(tokenizer, {question!r})]))
tokens = generate(model, prompt, {sampling})
print(tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True))
```"""


@dataclass(frozen=True)
class Measurement:
    """The measurements of one model.

    Attributes:
        exact_match: the share of right answers, in [0, 1].
        generations: one {instruction, generation, extracted, answer, correct} for each test row.
        noise_levels, curve: values of λ, and the loss at each λ in nats per masked token.
        validation_loss: the training objective on the validation rows.
        validation_margin, validation_accuracy: those of preferences; None for other objectives.
    """

    exact_match: float
    generations: list[dict[str, Any]]
    noise_levels: list[float]
    curve: list[float]
    validation_loss: float
    validation_margin: float | None = None
    validation_accuracy: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a run: call `measure` with a model before and after training.

    Pass the model without DDP's wrapper. The evaluation doesn't enable or disable its adapter.
    """

    run: Run[Arguments]
    base: TextBase
    data: TextData

    def measure(self, model: nn.Module) -> Measurement:
        """Return all measurements. The λ of the curve are equally spaced up to 1."""
        accelerator, points = self.run.accelerator, self.run.args.curve_points
        levels = [(i + 1) / points for i in range(points)]

        rows: Any = self.data.validation_rows

        def losses(indices: Sequence[int]) -> list[float]:
            return self.base.kind.curve(
                model,
                rows,
                [levels[i] for i in indices],
                collator=self.data.collator,
                batch_size=self.run.args.eval_batch_size,
                seed=self.run.args.seed,
                progress=self.run.is_main,
            )

        generations = split_across_processes(
            accelerator, len(self.data.test.rows), partial(self.generations, model)
        )
        curve = split_across_processes(accelerator, len(levels), losses)
        share = sum(generation["correct"] for generation in generations) / len(generations)
        validation = self.validate(model)
        names = (f"validation_{name}" for name in ("loss", *self.base.kind.figures))
        figures = {name: validation[name] for name in names}
        return Measurement(share, generations, levels, curve, **figures)

    def generations(self, model: nn.Module, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return the answers to these test rows."""
        args, device = self.run.args, self.run.accelerator.device
        rows: Any = self.data.test.rows.select(indices)
        result = exact_match(
            model,
            self.base.tokenizer,
            rows,
            batch_size=args.eval_batch_size,
            extract=args.extract,
            progress=self.run.is_main,
            generator=torch.Generator(device).manual_seed(args.seed),
            **vars(self.base.sampling),
        )
        return result.generations

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Return {"validation_loss": …}, the training objective on the validation rows.

        All calls use the same λ and masks, with one λ for each row, stratified over all rows. A run
        with a window also returns the means inside and outside the window, and one on preferences
        the means of the margin and the accuracy.
        """
        args, accelerator, kind = self.run.args, self.run.accelerator, self.base.kind
        rows: Any = self.data.validation_rows
        names = ("per_sample", "noise_level", *kind.figures)

        def losses(indices: Sequence[int]) -> list[tuple[float, ...]]:
            values: list[tuple[float, ...]] = []
            size, device = max(1, args.eval_batch_size // kind.rows_per_sample), accelerator.device
            for batch in batches_of(rows, indices, self.data.collator, size, device):
                # not the training seed, since training draws for the same indices
                seed = args.seed + 1
                levels = draw_noise_levels(batch["sample_indices"], seed, len(rows))
                loss = kind.loss(model, **batch, seed=seed, noise_level=torch.tensor(levels))
                values += zip(*(getattr(loss, name).tolist() for name in names), strict=True)
            return values

        with evaluating(model):
            measured = split_across_processes(accelerator, len(rows), losses)
        values = torch.tensor(measured, dtype=torch.float32).T  # (2 or more, rows)
        means = validation_means(values[0], values[1], window_of(args))
        for name, column in zip(kind.figures, values[2:], strict=True):
            means[f"validation_{name}"] = column.double().mean().item()
        return means


def figures(before: Measurement, after: Measurement) -> list[list[str]]:
    """Return rows of (what, before, after): exact match, validation loss, preferences if any."""
    match = f"exact match (n = {len(after.generations)})"
    rows = [
        [match, f"{before.exact_match:.1%}", f"{after.exact_match:.1%}"],
        ["validation loss", f"{before.validation_loss:.3f}", f"{after.validation_loss:.3f}"],
    ]
    if after.validation_accuracy is not None:
        accuracies = [f"{side.validation_accuracy:.1%}" for side in (before, after)]
        margins = [f"{side.validation_margin:.3f}" for side in (before, after)]
        rows += [["preference accuracy", *accuracies], ["preference margin", *margins]]
    return rows


def describe(
    evaluation: Evaluation,
    before: Measurement,
    after: Measurement,
    question: str,
) -> dict[str, Any]:
    """Write samples.jsonl into the run's folder, and return the texts of its card.

    Args:
        question: the question in the card's code.
    """
    samples = [
        {
            "instruction": one["instruction"],
            "answer": one["answer"],
            "before": one["generation"],
            "after": other["generation"],
            "correct_before": one["correct"],
            "correct_after": other["correct"],
        }
        for one, other in zip(before.generations, after.generations, strict=True)
    ]
    run, args = evaluation.run, evaluation.run.args
    lines = [f"{json.dumps(sample, ensure_ascii=False)}\n" for sample in samples]
    write_text(run.folder / "samples.jsonl", "".join(lines))
    note = f"Exact match compares generated answers.{evaluation.base.kind.note} [Samples](samples.jsonl)."
    base, data = args.pretrained_model_name_or_path, args.dataset_name or args.train_file
    where = run.hub_id or str(run.folder)
    return {
        "measured_on": "validation records",
        "unit": evaluation.base.kind.unit,
        "about": f"for the masked-diffusion language model `{base}`, trained on `{data}`.",
        "how_good": ("", note),
        "loading": _loading(evaluation, where, question),
        "tags": ["masked-diffusion", "text-generation"],
        "library": "transformers" if args.adapter == "full" else "peft",
    }


def _loading(evaluation: Evaluation, folder: str, question: str) -> str:
    """Return the card's code that loads the adapter and asks a question."""
    args, kind = evaluation.run.args, evaluation.base.kind
    base, names, imports, lines = args.pretrained_model_name_or_path, ["mask_token"], "", []
    if args.adapter == "full":
        base = folder
    else:
        names += ["revision", "load_in_4bit", "load_in_8bit"]
        imports = "from peft import PeftModel\n"
        lines = [f"model = PeftModel.from_pretrained(model, {folder!r})"]
    options = [f", {name}={getattr(args, name)!r}" for name in names if getattr(args, name)]
    loading = f"model, tokenizer = load_backbone({base!r}{''.join(options)})"
    changes = [f"model.config.{name} = {new!r}" for name, new in kind.changed_fields(args).items()]
    lines = [loading, *changes, *lines]
    if needs_schedule(args):
        imports += "\nfrom nara_diffusion import StrengthSchedule, set_strength"
        lines.append(schedule_line(args))
    settings = [f"{name}={value!r}" for name, value in evaluation.base.sampling.changed().items()]
    code = _LOADING.format(
        imports=imports,
        loading=core_import(args) + "\n".join(lines),
        question=question,
        sampling=", ".join(settings),
    )
    if reads_noise(args) or needs_schedule(args):
        code += f"\n\nIn `generate` the adapter runs at λ, the {kind.share}, at each step."
    if kind.merge_warning and method_of(args).family != "nara":  # a NaRA refuses to be merged
        code += f"\n\n{kind.merge_warning}"
    return code


def schedule_line(args: Arguments) -> str:
    """Return the code that gives a LoRA its strength over λ."""
    return f'set_strength(model, "default", {schedule_of(args)!r})'
