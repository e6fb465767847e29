"""The report in a fine-tuned language model's folder: table, plot, samples, model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nara_diffusion.training.arguments import schedule_of, window_of
from nara_diffusion.training.report import (
    core_import,
    format_table,
    needs_schedule,
    plot_noise_level_curves,
    reads_noise,
    schedule_note,
    write_run_card,
    write_samples,
)

from .before_after import Measurement

SAMPLES = 40  # generations on the page

_LOADING = """\
```python
import torch
{imports}
from nara_diffusion.dllm import encode_prompts, generate, load_backbone, prompt_text

{loading}
prompt = torch.tensor(encode_prompts(tokenizer, [prompt_text(tokenizer, {instruction!r})]))
tokens = generate(model, prompt, gen_length={gen_length}, steps={steps}, block_length={block_length})
print(tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True))
```"""
_ADAPTER = "model, tokenizer = load_backbone({base!r}{options})\nmodel = PeftModel.from_pretrained(model, {folder!r})"
_WHOLE = "model, tokenizer = load_backbone({folder!r}{options})"
_NOISE = "\n\n`generate` tells the adapter λ, the masked share of the answer, at each step."


def results_table(before: Measurement, after: Measurement) -> str:
    """Exact match and validation loss, before and after, as text."""
    rows = _figures(before, after)
    rows[0][0] = f"exact match (n = {len(after.generations)})"
    return format_table(["", "before", "after"], rows)


def write_run_report(
    folder: Path, args: Any, facts: Mapping[str, str], before: Measurement, after: Measurement, load_from: str
) -> None:
    """Write noise_level_curve.png, samples.html and README.md into `folder`.

    Args:
        args: the run's arguments.
        facts: {what: value} of the run for the card, such as the number of trainable parameters.
        before, after: the measurements of the base model and of the trained one.
        load_from: the path or the repository in the card's code.
    """
    name = Path(args.pretrained_model_name_or_path).name
    plot_noise_level_curves(
        folder / "noise_level_curve.png",
        after.noise_levels,
        before.curve,
        after.curve,
        f"{name}: loss over the noise level, held-out records",
        "nats per masked token",
        window_of(args),
    )
    rows = [
        [
            (old["instruction"], None),
            (old["answer"], None),
            (old["generation"], old["correct"]),
            (new["generation"], new["correct"]),
        ]
        for old, new in zip(before.generations[:SAMPLES], after.generations[:SAMPLES], strict=True)
    ]
    write_samples(folder / "samples.html", f"{name}: samples", ["question", "answer", "before", "after"], rows)
    ending = (
        "Exact match compares generated answers. [Samples](samples.html). The loss at each noise level:\n\n"
        "![loss over the noise level](noise_level_curve.png)"
    )
    write_run_card(
        folder,
        args,
        facts,
        name=name,
        about=f"for the masked-diffusion language model `{args.pretrained_model_name_or_path}`, trained on "
        f"`{args.dataset_name or args.train_file}`.",
        figures=_figures(before, after),
        how_good=("", ending),
        loading=_loading(args, after.generations[0]["instruction"], load_from),
        tags=["masked-diffusion", "text-generation"],
        library="transformers" if args.adapter == "full" else "peft",
    )


def _loading(args: Any, instruction: str, folder: str) -> str:
    """The code in the card that loads the adapter."""
    whole = args.adapter == "full"
    names = ("mask_token",) if whole else ("mask_token", "revision", "ignore_tensors")
    options = "".join(f", {name}={getattr(args, name)!r}" for name in names if getattr(args, name))
    imports = "" if whole else "from peft import PeftModel\n"
    if needs_schedule(args):
        imports += "\nfrom nara_diffusion import StrengthSchedule, set_strength"
    return _LOADING.format(
        imports=imports,
        loading=core_import(args)
        + (_WHOLE if whole else _ADAPTER).format(
            base=args.pretrained_model_name_or_path, folder=folder, options=options
        )
        + (f"\n{_schedule_line(args)}" if needs_schedule(args) else ""),
        instruction=instruction,
        gen_length=args.gen_length,
        steps=args.generation_steps,
        block_length=args.block_length,
    ) + (_NOISE if reads_noise(args) or needs_schedule(args) else "")


def _schedule_line(args: Any) -> str:
    return f'set_strength(model, "default", {schedule_of(args)!r})'


def window_note(args: Any) -> str:
    """What is said at the end of a LoRA's run in a window; nothing of other runs."""
    return schedule_note(_schedule_line(args)) if needs_schedule(args) else ""


def _figures(before: Measurement, after: Measurement) -> list[list[str]]:
    return [
        [f"exact match on {len(after.generations)} held-out records", _percent(before), _percent(after)],
        ["validation loss", f"{before.validation_loss:.3f}", f"{after.validation_loss:.3f}"],
    ]


def _percent(measurement: Measurement) -> str:
    return f"{100 * measurement.exact_match:.1f} %"
