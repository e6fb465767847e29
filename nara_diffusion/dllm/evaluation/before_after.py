"""A run's measurements before and after training, split over processes, and its report: table, plot, samples, card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from nara_diffusion.dllm.data.collator import AnswerCollator
from nara_diffusion.dllm.decoding import Sampling
from nara_diffusion.dllm.loss import masked_diffusion_loss
from nara_diffusion.dllm.models.backbone import evaluating
from nara_diffusion.noise.strength_schedule import EVERYTHING, NoiseWindow
from nara_diffusion.training.arguments import schedule_of, window_of
from nara_diffusion.training.engines import split_across_processes
from nara_diffusion.training.report import (
    before_and_after,
    core_import,
    format_table,
    needs_schedule,
    plot_noise_level_curves,
    reads_noise,
    schedule_note,
    validation_means,
    write_run_card,
    write_text,
)

from .exact_match import exact_match
from .noise_curve import batches_of, noise_level_curve

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
_ENDING = """\
Exact match compares generated answers. [Samples](samples.jsonl). The loss at each noise level:

![loss over the noise level](noise_level_curve.png)"""


@dataclass(frozen=True)
class Measurement:
    """Attributes:
    exact_match: share of right answers, in [0, 1].
    generations: one {instruction, generation, extracted, answer, correct} a test row.
    noise_levels, curve: λ, and the loss there in nats a masked token.
    validation_loss: the training objective on the validation rows.
    sampling: the settings of the generations.
    """

    exact_match: float
    generations: list[dict[str, Any]]
    noise_levels: list[float]
    curve: list[float]
    validation_loss: float
    sampling: Sampling


def measure(
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    validation_rows: Dataset,
    test_rows: Dataset,
    collator: AnswerCollator,
    *,
    seed: int,
    batch_size: int,
    curve_points: int,
    extract: str,
    sampling: Sampling,
) -> Measurement:
    """Measure `model`, without DDP's wrapper, with its adapter as it is; the curve's λ are equally spaced up to 1."""
    options: dict[str, Any] = {"batch_size": batch_size, "progress": accelerator.is_main_process}
    levels = [(i + 1) / curve_points for i in range(curve_points)]

    def generate(indices: Sequence[int]) -> list[dict[str, Any]]:
        generator = torch.Generator(accelerator.device).manual_seed(seed)
        rows: Any = test_rows.select(indices)
        settings = {**asdict(sampling), "extract": extract, **options}
        return exact_match(model, tokenizer, rows, generator=generator, **settings).generations

    def losses(indices: Sequence[int]) -> list[float]:
        rows: Any = validation_rows
        return noise_level_curve(model, rows, [levels[i] for i in indices], collator=collator, seed=seed, **options)

    generations = split_across_processes(accelerator, len(test_rows), generate)
    curve = split_across_processes(accelerator, len(levels), losses)
    validation = validation_losses(accelerator, model, validation_rows, collator, seed=seed, batch_size=batch_size)
    share = sum(generation["correct"] for generation in generations) / len(generations)
    return Measurement(share, generations, levels, curve, validation["validation_loss"], sampling)


@torch.no_grad()
def validation_losses(
    accelerator: Accelerator,
    model: nn.Module,
    rows: Dataset,
    collator: AnswerCollator,
    *,
    seed: int,
    batch_size: int,
    window: NoiseWindow = EVERYTHING,
) -> dict[str, float]:
    """{"validation_loss"}: the training objective, at the same λ and masks at each call.

    λ is stratified over all `rows`; with a `window` the means inside and outside of it are there too.
    """

    def losses(indices: Sequence[int]) -> list[tuple[float, float]]:
        pairs: list[tuple[float, float]] = []
        for batch in batches_of(rows, indices, collator, batch_size, accelerator.device):  # type: ignore[arg-type]
            # another seed than that of training, whose draws have the same indices
            loss = masked_diffusion_loss(model, **batch, seed=seed + 1, group_size=len(rows))
            pairs += zip(loss.per_sample.tolist(), loss.noise_level.tolist(), strict=True)
        return pairs

    with evaluating(model):
        pairs = torch.tensor(split_across_processes(accelerator, len(rows), losses), dtype=torch.float32)
    return validation_means(pairs[:, 0], pairs[:, 1], window)


def compare(before: Measurement, after: Measurement) -> dict[str, Any]:
    """The content of results.json: both measurements, without the generations."""
    return before_and_after(before, after, ("exact_match", "validation_loss", "curve"))


def results_table(before: Measurement, after: Measurement) -> str:
    """Exact match and validation loss, before and after, as text."""
    return format_table(["", "before", "after"], _figures(before, after))


def _figures(before: Measurement, after: Measurement) -> list[list[str]]:
    shares, losses = (
        [format_.format(getattr(one, name)) for one in (before, after)]
        for name, format_ in (("exact_match", "{:.1%}"), ("validation_loss", "{:.3f}"))
    )
    return [[f"exact match (n = {len(after.generations)})", *shares], ["validation loss", *losses]]


def write_run_report(
    folder: Path,
    args: Any,
    facts: Mapping[str, str],
    before: Measurement,
    after: Measurement,
    *,
    load_from: str,
    question: str | list[dict[str, str]],
) -> None:
    """Write noise_level_curve.png, samples.jsonl and README.md into `folder`; the card's code loads `load_from`, and
    asks `question`, a text or the turns of a conversation."""
    base = args.pretrained_model_name_or_path
    name = Path(base).name
    title, unit = f"{name}: loss over the noise level, held-out records", "nats per masked token"
    curves = (after.noise_levels, before.curve, after.curve)
    plot_noise_level_curves(folder / "noise_level_curve.png", *curves, title, unit, window_of(args))
    lines = [
        {"instruction": one["instruction"], "answer": one["answer"], "before": one["generation"]}
        | {"after": other["generation"], "correct_before": one["correct"], "correct_after": other["correct"]}
        for one, other in zip(before.generations, after.generations, strict=True)
    ]
    write_text(folder / "samples.jsonl", "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))
    write_run_card(
        folder,
        args,
        facts,
        name=name,
        about=f"for the masked-diffusion language model `{base}`, trained on `{args.dataset_name or args.train_file}`.",
        figures=_figures(before, after),
        how_good=("", _ENDING),
        loading=_loading(args, after, load_from, question),
        tags=["masked-diffusion", "text-generation"],
        library="transformers" if args.adapter == "full" else "peft",
    )


def _loading(args: Any, measured: Measurement, folder: str, question: str | list[dict[str, str]]) -> str:
    """The code in the card that loads the adapter."""
    is_whole = args.adapter == "full"
    names = ("mask_token",) if is_whole else ("mask_token", "revision", "load_in_4bit", "load_in_8bit")
    options = "".join(f", {name}={getattr(args, name)!r}" for name in names if getattr(args, name))
    base = folder if is_whole else args.pretrained_model_name_or_path
    lines = [f"model, tokenizer = load_backbone({base!r}{options})"]
    lines += [] if is_whole else [f"model = PeftModel.from_pretrained(model, {folder!r})"]
    imports = "" if is_whole else "from peft import PeftModel\n"
    if needs_schedule(args):
        imports += "\nfrom nara_diffusion import StrengthSchedule, set_strength"
        lines.append(_schedule_line(args))
    code = _LOADING.format(
        imports=imports,
        loading=core_import(args) + "\n".join(lines),
        question=question,
        sampling=", ".join(f"{name}={value!r}" for name, value in measured.sampling.changed().items()),
    )
    if reads_noise(args) or needs_schedule(args):
        code += "\n\nIn `generate` the adapter runs at λ, the masked share of the answer, at each step."
    return code


def window_note(args: Any) -> str:
    """What is said at the end of a LoRA's run in a window; nothing of other runs."""
    return schedule_note(_schedule_line(args)) if needs_schedule(args) else ""


def _schedule_line(args: Any) -> str:
    return f'set_strength(model, "default", {schedule_of(args)!r})'
