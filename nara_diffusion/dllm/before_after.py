"""A run's measurements before and after training, split over processes, and what its report says of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from nara_diffusion.training.arguments import schedule_of, window_of
from nara_diffusion.training.engines import split_across_processes
from nara_diffusion.training.report import (
    core_import,
    needs_schedule,
    reads_noise,
    validation_means,
    write_text,
)
from nara_diffusion.training.run import Run

from .batches import AnswerCollator
from .decoding import Sampling
from .exact_match import exact_match
from .loss import batches_of, masked_diffusion_loss, noise_level_curve
from .models.backbone import evaluating

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
    """Attributes:
    exact_match: share of right answers, in [0, 1].
    generations: one {instruction, generation, extracted, answer, correct} a test row.
    noise_levels, curve: λ, and the loss there in nats a masked token.
    validation_loss: the training objective on the validation rows.
    """

    exact_match: float
    generations: list[dict[str, Any]]
    noise_levels: list[float]
    curve: list[float]
    validation_loss: float


@dataclass(frozen=True)
class Evaluation:
    """Measures a model, without DDP's wrapper and with its adapter as it is; all processes share the work.

    Attributes:
        validation_rows, test_rows: of `encode_records`.
        sampling: how answers to the test rows are generated.
    """

    run: Run
    tokenizer: PreTrainedTokenizerBase
    validation_rows: Dataset
    test_rows: Dataset
    collator: AnswerCollator
    sampling: Sampling

    def measure(self, model: nn.Module) -> Measurement:
        """All that a report has; the curve's λ are equally spaced up to 1."""
        accelerator, args = self.run.accelerator, self.run.args
        options: dict[str, Any] = {
            "batch_size": args.eval_batch_size,
            "progress": accelerator.is_main_process,
        }
        levels = [(i + 1) / args.curve_points for i in range(args.curve_points)]

        def generate(indices: Sequence[int]) -> list[dict[str, Any]]:
            generator = torch.Generator(accelerator.device).manual_seed(args.seed)
            rows: Any = self.test_rows.select(indices)
            settings = {**asdict(self.sampling), "extract": args.extract, **options}
            return exact_match(
                model, self.tokenizer, rows, generator=generator, **settings
            ).generations

        def losses(indices: Sequence[int]) -> list[float]:
            rows: Any = self.validation_rows
            settings = {"collator": self.collator, "seed": args.seed, **options}
            return noise_level_curve(model, rows, [levels[i] for i in indices], **settings)

        generations = split_across_processes(accelerator, len(self.test_rows), generate)
        curve = split_across_processes(accelerator, len(levels), losses)
        share = sum(generation["correct"] for generation in generations) / len(generations)
        return Measurement(
            share, generations, levels, curve, self.validate(model)["validation_loss"]
        )

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """{"validation_loss"}: the training objective, at the same λ and masks at each call.

        λ is stratified over all rows; a run in a window has the means inside and outside of it too.
        """
        accelerator, args, rows = self.run.accelerator, self.run.args, self.validation_rows

        def losses(indices: Sequence[int]) -> list[tuple[float, float]]:
            pairs: list[tuple[float, float]] = []
            size, device = args.eval_batch_size, accelerator.device
            for batch in batches_of(rows, indices, self.collator, size, device):  # type: ignore[arg-type]
                # another seed than that of training, whose draws have the same indices
                loss = masked_diffusion_loss(
                    model, **batch, seed=args.seed + 1, group_size=len(rows)
                )
                pairs += zip(loss.per_sample.tolist(), loss.noise_level.tolist(), strict=True)
            return pairs

        with evaluating(model):
            pairs = torch.tensor(
                split_across_processes(accelerator, len(rows), losses), dtype=torch.float32
            )
        return validation_means(pairs[:, 0], pairs[:, 1], window_of(args))


def figures(before: Measurement, after: Measurement) -> list[list[str]]:
    """Exact match and validation loss: rows of (what, before, after)."""
    shares, losses = (
        [format_.format(getattr(one, name)) for one in (before, after)]
        for name, format_ in (("exact_match", "{:.1%}"), ("validation_loss", "{:.3f}"))
    )
    return [[f"exact match (n = {len(after.generations)})", *shares], ["validation loss", *losses]]


def describe(
    evaluation: Evaluation, before: Measurement, after: Measurement, question: Any
) -> dict[str, Any]:
    """Write samples.jsonl into the run's folder; and what its card says, whose code asks `question`, a text or the
    turns of a conversation."""
    lines = [
        {"instruction": one["instruction"], "answer": one["answer"], "before": one["generation"]}
        | {
            "after": other["generation"],
            "correct_before": one["correct"],
            "correct_after": other["correct"],
        }
        for one, other in zip(before.generations, after.generations, strict=True)
    ]
    run, args = evaluation.run, evaluation.run.args
    write_text(
        run.folder / "samples.jsonl",
        "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines),
    )
    base, data = args.pretrained_model_name_or_path, args.dataset_name or args.train_file
    return {
        "measured_on": "validation records",
        "unit": "nats per masked token",
        "about": f"for the masked-diffusion language model `{base}`, trained on `{data}`.",
        "how_good": ("", "Exact match compares generated answers. [Samples](samples.jsonl)."),
        "loading": _loading(args, evaluation.sampling, run.hub_id or str(run.folder), question),
        "tags": ["masked-diffusion", "text-generation"],
        "library": "transformers" if args.adapter == "full" else "peft",
    }


def _loading(args: Any, sampling: Sampling, folder: str, question: Any) -> str:
    """The code in the card that loads the adapter."""
    is_whole = args.adapter == "full"
    names = (
        ("mask_token",) if is_whole else ("mask_token", "revision", "load_in_4bit", "load_in_8bit")
    )
    options = "".join(f", {name}={getattr(args, name)!r}" for name in names if getattr(args, name))
    base = folder if is_whole else args.pretrained_model_name_or_path
    lines = [f"model, tokenizer = load_backbone({base!r}{options})"]
    lines += [] if is_whole else [f"model = PeftModel.from_pretrained(model, {folder!r})"]
    imports = "" if is_whole else "from peft import PeftModel\n"
    if needs_schedule(args):
        imports += "\nfrom nara_diffusion import StrengthSchedule, set_strength"
        lines.append(schedule_line(args))
    code = _LOADING.format(
        imports=imports,
        loading=core_import(args) + "\n".join(lines),
        question=question,
        sampling=", ".join(f"{name}={value!r}" for name, value in sampling.changed().items()),
    )
    if reads_noise(args) or needs_schedule(args):
        code += (
            "\n\nIn `generate` the adapter runs at λ, the masked share of the answer, at each step."
        )
    return code


def schedule_line(args: Any) -> str:
    """The code that gives a LoRA its strength over λ."""
    return f'set_strength(model, "default", {schedule_of(args)!r})'
